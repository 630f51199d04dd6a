"""Requests that Schemathesis makes up from /openapi.json, right and wrong ones, on the running daemon.

Schemathesis is used as a library: its examples come from Hypothesis, the same in every run, and as many as
are wanted. One daemon takes them all, and must serve as before afterwards.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.harness import Daemon, Installation, Json, sse_payloads

NAME = "mindie-tiny"
EVENTS = "text/event-stream"
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# they would end or halt the daemon that the other operations need
LEFT_ALONE = {"/stopService", "/v1/engine-server/fault-handling-command"}
# nothing runs that could be stopped, no adapter is there to be loaded, and nobody else does the prefill
NEVER_WELL = {
    "/v2/models/{model}/stopInfer",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/dresult",
}


@pytest.fixture(scope="module")
def brief(installation: Installation) -> Iterator[Daemon]:
    """A daemon whose every answer is short, whatever is asked for."""
    config = {"BackendConfig": {"ScheduleConfig": {"maxIterTimes": 6}}}
    daemon = installation.daemon(config).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="module")
def document(brief: Daemon) -> Json:
    document: Json = brief.manage("/openapi.json").json()
    return document


def generable(document: Json) -> Json:
    """The document with the one name that is served, which no generator would guess.

    What an event stream holds is told by `x-frames`, and compared by `check_frames`: the schema of its text
    would be taken for that of one event. A server that is well has no message to send, which no document can
    say of a body that is there otherwise.
    """
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"const": NAME}
    for item in document["paths"].values():
        for operation in item.values():
            if isinstance(operation, dict):
                operation["responses"].get("200", {}).get("content", {}).get(EVENTS, {}).pop("schema", None)
    for path in ("/v2/health/live", "/v2/health/ready"):
        document["paths"][path]["get"]["responses"]["200"].pop("content")
    return document


def check_frames(document: Json, path: str, response: Any) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"][EVENTS]
    frames = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in content["x-frames"]]}
    validator = jsonschema_rs.Draft202012Validator({**frames, "components": document["components"]})
    if response.content.endswith(b"\0"):
        payloads = response.content.decode().split("\0")[:-1]
    else:
        payloads = [frame for frame in sse_payloads(response.content) if frame != "[DONE]"]
    assert payloads
    for payload in payloads:
        validator.validate(json.loads(payload))


def strategy_of(operation: APIOperation, mode: GenerationMode) -> Any:
    """The served model where the body is what is tried, any name where there is none."""
    fixed = "{model}" in operation.path and (operation.method == "post" or mode.is_positive)
    return operation.as_strategy(generation_mode=mode, path_parameters={"model": NAME} if fixed else None)


def statuses(document: Json, operation: APIOperation, mode: GenerationMode, examples: int) -> Counter[int]:
    """How often each status was the answer; raises what a check finds, with a curl line that repeats it."""
    [server] = document["paths"][operation.path]["servers"]
    seen: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy_of(operation, mode))
    def ask(case: Case) -> None:
        response = case.call(base_url=server["url"], session=session, timeout=60)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        refused = 400 <= response.status_code < 500
        assert refused or mode.is_positive, f"{response.status_code}: {case.as_curl_command()}"
        if response.headers.get("content-type", [""])[0].startswith(EVENTS):
            check_frames(document, operation.path, response)

    with requests.Session() as session:
        ask()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_answers_are_as_documented(document: Json, brief: Daemon, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(generable(document))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == document["paths"].keys()
    for operation in operations:
        if operation.path in LEFT_ALONE:
            continue
        if mode.is_positive:
            seen = statuses(document, operation, mode, 12 if operation.method == "post" else 1)
            assert seen[200] or operation.path in NEVER_WELL, (operation.label, seen)
        elif operation.method == "post" or "{" in operation.path:
            assert statuses(document, operation, mode, 16 if operation.method == "post" else 4)
    assert " [ERROR] " not in brief.stderr
    assert brief.post("/generate", {"prompt": "Once upon a time"}).status == 200
