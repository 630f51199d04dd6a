"""Web pages of others that make a visitor's browser call this server: control routes answer none."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest

from tests.harness import HOST, TINY_MODEL, Answer, Daemon, Installation, merge, model_config

MOCK = model_config(
    modelInstanceType="StandardMock", modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL)
)
CONTROL = (("GET", "/stopService"), ("POST", "/v1/load_lora_adapter"))
FOREIGN = {
    "another origin": {"Origin": "https://evil.example"},
    "another port of this host": {"Origin": f"http://{HOST}:1"},
    "a page of no origin": {"Origin": "null"},
    "an image on another site": {"Sec-Fetch-Site": "cross-site"},
    "a page on another port": {"Sec-Fetch-Site": "same-site"},
    "a name pointed at this address": {"Host": "evil.example"},
    "the same, as its own origin": {"Host": "evil.example:80", "Origin": "http://evil.example:80"},
    "a name that ends like ours": {"Host": "evil-localhost"},
    "another address": {"Host": "203.0.113.9"},
}


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    proxy = {"BackendConfig": {"runtimeConfig": {"allowedHosts": ["llm.example.com"]}}}
    daemon = installation.daemon(merge(proxy, MOCK)).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


def call(daemon: Daemon, method: str, path: str, port: int, **headers: str) -> Answer:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("page", FOREIGN)
def test_A22_control_routes_refuse_pages_of_others(daemon: Daemon, page: str) -> None:
    for method, path in CONTROL:
        answer = call(daemon, method, path, daemon.management_port, **FOREIGN[page])
        assert answer.status == 403, (method, path)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        error = json.loads(answer.body)
        assert error["type"] == "Forbidden" and "`" in error["error"]
    assert daemon.get("/v1/models").status == 200


def test_A22_asking_for_the_head_alone_stops_nothing(daemon: Daemon) -> None:
    """aiohttp calls the handler of a GET for HEAD too, unless it is told otherwise."""
    answer = call(daemon, "HEAD", "/stopService", daemon.management_port)
    assert answer.status == 405 and answer.headers["allow"] == "GET"
    assert call(daemon, "HEAD", "/v2/health/ready", daemon.management_port).status == 200
    assert daemon.get("/v1/models").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:1026"},
        {"Host": "LLM.example.com:8443"},
        {"Host": "llm.example.com", "Origin": "https://llm.example.com"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
def test_A22_our_own_names_and_pages_get_through(daemon: Daemon, headers: dict[str, str]) -> None:
    """To the handler, which has no adapters to load."""
    answer = call(daemon, "POST", "/v1/load_lora_adapter", daemon.management_port, **headers)
    assert answer.status in (400, 422), answer.body


def test_A22_reading_and_business_ask_nobody_where_they_come_from(daemon: Daemon) -> None:
    """A proxy in front of the business plane may use any name."""
    page = {"Host": "evil.example", "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    for path, port in (
        ("/v2/health/ready", daemon.management_port),
        ("/docs", daemon.management_port),
        ("/v1/models", daemon.port),
    ):
        answer = call(daemon, "GET", path, port, **page)
        assert answer.status == 200, path
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_A22_preflights_are_405_without_permission(daemon: Daemon) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for path, port in (("/v1/completions", daemon.port), ("/stopService", daemon.management_port)):
        answer = call(daemon, "OPTIONS", path, port, **asked)
        assert answer.status == 405
        assert not [name for name in answer.headers if name.startswith("access-control-")]
