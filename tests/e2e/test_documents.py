"""/openapi.json and /docs of a running daemon: what they show works, and what is answered is as they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.harness import Daemon, Json

# what needs something that an example cannot bring: a running request, an adapter's files, an end
NEEDS_MORE = {
    "/v2/models/{model}/stopInfer": 404,
    "/v1/load_lora_adapter": 400,
    "/v1/unload_lora_adapter": 400,
}
ENDS_THE_SERVER = "/stopService"


@pytest.fixture(scope="module")
def document(server: Daemon) -> Json:
    found: Json = server.manage("/openapi.json").json()
    return found


def address(path: str) -> str:
    return path.replace("{model}", "mindie-tiny").replace("{seconds}", "10")


def fits(document: Json, schema: Json, value: Any) -> None:
    schema = {**schema, "components": document["components"]}
    assert [error.message for error in Draft202012Validator(schema).iter_errors(value)] == [], value


def examples(document: Json) -> Iterator[tuple[str, Json, Json]]:
    """path, operation, body"""
    for path, item in document["paths"].items():
        if "post" in item:
            content = item["post"]["requestBody"]["content"]["application/json"]
            for example in content["examples"].values():
                yield path, item["post"], example["value"]


def test_addresses_are_the_ones_listened_on(server: Daemon, document: Json) -> None:
    ports = {item["servers"][0]["url"].rpartition(":")[2] for item in document["paths"].values()}
    assert ports == {str(port) for port in (server.port, server.management_port, server.metrics_port)}


def test_every_example_is_answered_as_described(server: Daemon, document: Json) -> None:
    for path, operation, body in examples(document):
        answer = server.request("POST", address(path), body, port=port_of(server, operation))
        if path in NEEDS_MORE:
            assert answer.status == NEEDS_MORE[path], answer.body
            assert str(answer.status) in operation["responses"]
            continue
        assert answer.status == 200, (path, body, answer.body)
        content = operation["responses"]["200"]["content"]
        content_type = answer.headers["content-type"].partition(";")[0]
        if content_type == "application/json":
            fits(document, content[content_type]["schema"], answer.json())
            continue
        frames = answer.body.decode().replace("data:", "").replace("\0", "\n\n").split("\n\n")
        payloads = [frame for frame in frames if frame.strip() not in ("", "[DONE]")]
        assert payloads
        names = content[content_type]["x-frames"]
        schema = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}
        for payload in payloads:
            fits(document, schema, json.loads(payload))


def test_every_plain_route_is_answered_as_described(server: Daemon, document: Json) -> None:
    for path, item in document["paths"].items():
        if "get" not in item or path == ENDS_THE_SERVER:
            continue
        operation = item["get"]
        answer = server.request("GET", address(path), port=port_of(server, operation))
        assert str(answer.status) in operation["responses"], (path, answer.status)
        content = operation["responses"][str(answer.status)].get("content", {})
        if answer.status == 200 and answer.body:
            content_type = answer.headers["content-type"].partition(";")[0]
            assert content_type in content, path
            if content_type == "application/json":
                fits(document, content[content_type]["schema"], answer.json())


def port_of(server: Daemon, operation: Json) -> int:
    ports = {"business": server.port, "management": server.management_port, "metrics": server.metrics_port}
    return ports[operation["tags"][0]]


def test_the_page_is_served_with_leave_for_nothing(server: Daemon) -> None:
    answer = server.manage("/docs")
    assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert b"mindie-tiny" in answer.body
