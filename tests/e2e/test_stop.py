"""stopInfer wherever the request is, and the names a request goes by."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import (
    TINY_MODEL,
    Daemon,
    Installation,
    Json,
    eventually,
    merge,
    model_config,
    sse_payloads,
)

NAME = "mindie-tiny"
MODEL = f"/v2/models/{NAME}"
STOP = f"{MODEL}/stopInfer"
TOKENS = 4000
TRITON: Json = {"text_input": "Once", "parameters": {"max_new_tokens": TOKENS, "details": True}}
COMPLETION: Json = {"model": NAME, "prompt": "Once", "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def narrow(installation: Installation) -> Iterator[Daemon]:
    """Two prompts run, what comes next is queued in the engine, and only two requests are admitted."""
    config: Json = {
        "ServerConfig": {"maxLinkNum": 2},
        "BackendConfig": {
            "ScheduleConfig": {"maxIterTimes": TOKENS, "maxBatchSize": 2, "maxPrefillBatchSize": 2},
            "ModelDeployConfig": {"maxSeqLen": 4096},
        },
    }
    model = model_config(modelName=NAME, modelWeightPath=str(TINY_MODEL), ignore_eos=True)
    daemon = installation.daemon(merge(config, model)).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@contextlib.contextmanager
def sent(daemon: Daemon, path: str, body: Json, **headers: str) -> Iterator[http.client.HTTPConnection]:
    """A request that has been sent, its answer still to be read."""
    with contextlib.closing(daemon.connect()) as connection:
        connection.request("POST", path, json.dumps(body).encode(), headers)
        yield connection


@contextlib.contextmanager
def full(daemon: Daemon) -> Iterator[http.client.HTTPResponse]:
    """While this stream runs, nothing else does."""
    body = {**COMPLETION, "prompt": ["Once", "Twice"], "stream": True}
    with sent(daemon, "/v1/completions", body, **{"req-id": "running"}) as connection:
        response = connection.getresponse()
        yield response
        daemon.post(STOP, {"id": "running"})
        response.read()


def stop(daemon: Daemon, name: str) -> None:
    """As soon as it is known."""
    eventually(lambda: daemon.post(STOP, {"id": name}).status == 200, 30.0, f"{name} is known")


def answer_of(connection: http.client.HTTPConnection) -> Any:
    response = connection.getresponse()
    raw = response.read()
    assert response.status == 200, raw
    return json.loads(raw)


def frames_of(connection: http.client.HTTPConnection) -> list[str]:
    response = connection.getresponse()
    assert response.status == 200
    return sse_payloads(response.read())


def test_who_has_no_token_yet_ends_at_once_without_one(narrow: Daemon) -> None:
    bodies = {name: {**TRITON, "id": name} for name in ("queued", "waiting")}
    with (
        full(narrow),
        sent(narrow, f"{MODEL}/generate", bodies["queued"]) as queued,
        contextlib.ExitStack() as stack,
    ):
        eventually(lambda: waiting(narrow) == 1, 30.0, "it is queued in the engine")
        later = stack.enter_context(sent(narrow, f"{MODEL}/generate", bodies["waiting"]))
        for name, connection in (("waiting", later), ("queued", queued)):  # not in the order they came
            stop(narrow, name)
            answer = answer_of(connection)
            assert answer["text_output"] == "" and answer["id"] == name
            assert answer["details"]["finish_reason"] == "stop_sequence"
            assert answer["details"]["generated_tokens"] == 0
        assert narrow.post(STOP, {"id": "queued"}).status == 404
    # no place was lost on the way
    assert narrow.post(
        f"{MODEL}/generate", {"text_input": "Once", "parameters": {"max_new_tokens": 1}}
    ).json()


def waiting(daemon: Daemon) -> int:
    count: int = daemon.manage("/v1/status").json()["resource"]["waitingRequestNum"]
    return count


DIALECTS: list[tuple[str, Json]] = [
    ("/v1/completions", COMPLETION),
    ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "a"}]}),
    ("/generate", {"prompt": "Once"}),
    ("/generate_stream", {"inputs": "Once", "parameters": {"details": True}}),
    ("/infer", {"inputs": "Once", "parameters": {"details": True}}),
]


@pytest.mark.parametrize(("path", "body"), DIALECTS)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_dialect_can_say_that_there_is_nothing(
    narrow: Daemon, path: str, body: Json, streamed: bool
) -> None:
    with full(narrow), sent(narrow, path, {**body, "stream": streamed}, **{"req-id": "mine"}) as connection:
        stop(narrow, "mine")
        if path == "/generate":
            raw = connection.getresponse().read()
            assert json.loads(raw.rstrip(b"\0")) == {"text": ["" if streamed else "Once "]}
        elif streamed or path == "/generate_stream":
            frames = frames_of(connection)
            if path.startswith("/v1"):
                assert frames.pop() == "[DONE]"
            (frame,) = map(json.loads, frames)
            said = frame["choices"][0] if path.startswith("/v1") else frame["details"]
            assert said["finish_reason"] in ("stop", "stop_sequence")
            if path.startswith("/v1"):
                assert frame["usage"]["completion_tokens"] == 0 == len(frame["usage"]["batch_size"])
            else:
                assert frame["token"]["id"] == [] and said["generated_tokens"] == 0
        else:
            answer = answer_of(connection)
            if path.startswith("/v1"):
                assert answer["usage"]["completion_tokens"] == 0
                assert answer["choices"][0]["finish_reason"] == "stop"
            else:
                assert answer["generated_text"] == "" and answer["details"]["generated_tokens"] == 0


def test_all_choices_of_all_prompts_end_together(narrow: Daemon) -> None:
    body = {**COMPLETION, "prompt": ["Once", "Twice"], "stream": True}
    with (
        sent(narrow, "/v1/completions", {**COMPLETION, "stream": True}, **{"req-id": "other"}) as other,
        sent(narrow, "/v1/completions", body, **{"req-id": "both"}) as connection,
    ):
        eventually(lambda: waiting(narrow) == 1, 30.0, "one of the two prompts waits for the other request")
        response = connection.getresponse()
        stop(narrow, "both")
        *payloads, done = sse_payloads(response.read())
        stop(narrow, "other")
        other.getresponse().read()
    choices = [json.loads(payload)["choices"][0] for payload in payloads]
    ends = [choice["index"] for choice in choices if choice["finish_reason"] == "stop"]
    assert done == "[DONE]" and sorted(ends) == [0, 1]


def test_an_id_belongs_to_one_request_at_a_time(narrow: Daemon) -> None:
    with full(narrow):
        for path in ("generate", "generate_stream"):
            refused = narrow.post(f"{MODEL}/{path}", {**TRITON, "id": "running"})
            assert refused.status == 422 and '"running"' in refused.json()["error"]
    short = {"text_input": "Once", "id": "running", "parameters": {"max_new_tokens": 1}}
    for _ in range(2):  # one after the other
        assert narrow.post(f"{MODEL}/generate", short).status == 200


def test_the_header_names_a_request_of_any_dialect(narrow: Daemon) -> None:
    name = "node-1:req.7_a"
    with sent(narrow, "/v1/completions", {**COMPLETION, "stream": True}, **{"req-id": name}) as connection:
        response = connection.getresponse()
        assert len(response.headers["RequestUUID"]) == 32
        stop(narrow, name)
        assert sse_payloads(response.read())[-1] == "[DONE]"
    assert narrow.post(STOP, {"id": name}).status == 404


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 129, "ä".encode().decode("latin-1")])
def test_a_header_that_is_no_name_is_ignored(narrow: Daemon, name: str) -> None:
    """Our own takes its place, which the answer tells."""
    with sent(narrow, "/v1/completions", {**COMPLETION, "stream": True}, **{"req-id": name}) as connection:
        response = connection.getresponse()
        if name != "x" * 129:
            assert narrow.post(STOP, {"id": name}).status == 422
        else:
            assert narrow.post(STOP, {"id": name}).status == 404
        stop(narrow, response.headers["RequestUUID"])
        assert sse_payloads(response.read())[-1] == "[DONE]"


def test_a_header_that_is_taken_does_not_refuse_the_request(narrow: Daemon) -> None:
    body = {"prompt": "Once", "max_tokens": 3}
    with full(narrow), sent(narrow, "/generate", body, **{"req-id": "running"}) as second:
        eventually(lambda: waiting(narrow) == 1, 30.0, "it is queued in the engine")
        stop(narrow, "running")  # the first one
        assert len(answer_of(second)["text"][0]) > len("Once ")
