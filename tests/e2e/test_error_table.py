"""The error table of docs/api.md: one test per row and endpoint, on the running daemon.

After each refusal the next good request to the same endpoint is answered: bad input harms only its sender.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.endpoints import ENDPOINTS, MODEL, NAME, Endpoint
from tests.harness import (
    HOST,
    TINY_MODEL,
    Answer,
    Daemon,
    Installation,
    Json,
    eventually,
    merge,
    model_config,
)

LONG = 8000  # tokens: as many as the shipped model has positions, seconds of work
ENDLESS = merge(
    {
        "BackendConfig": {
            "ScheduleConfig": {"maxIterTimes": LONG, "maxPrefillTokens": 8192},
            "ModelDeployConfig": {"maxSeqLen": 8192},
        }
    },
    model_config(modelName=NAME, modelWeightPath=str(TINY_MODEL), ignore_eos=True),
)

every_endpoint = pytest.mark.parametrize("endpoint", [pytest.param(e, id=e.name) for e in ENDPOINTS.values()])


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("endpoint", [pytest.param(ENDPOINTS[name], id=name) for name in names])


OPENAI = ("chat", "completions")
TRITON = ("triton generate", "triton stream", "triton infer")
TOKENS_IN = ("completions", "triton infer", "infer", "infer_token")


def assert_error(answer: Answer, status: int, kind: str, *words: str) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert isinstance(body["error"], str) and body["error"]
    assert body["error_type"] == body["type"] == kind
    for word in words:
        assert word in body["error"], body["error"]


def assert_served(server: Daemon, endpoint: Endpoint) -> None:
    assert endpoint.ask(server, max_tokens=2).status == 200


@contextlib.contextmanager
def asked(server: Daemon, endpoint: Endpoint, **options: Any) -> Iterator[http.client.HTTPConnection]:
    """A request on its way whose answer nobody waits for yet."""
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", endpoint.path, json.dumps(endpoint.body(**options)).encode())
        yield connection


# -- 422: whatever can be known from the body ---------------------------------------------------------


@every_endpoint
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"1", b'"text"', b"null", b"\xff\xfe", b"NaN", b'{"a": 1e', b"[" * 10_000]
)
def test_422_no_json_object(server: Daemon, endpoint: Endpoint, raw: bytes) -> None:
    assert_error(server.post(endpoint.path, raw), 422, "Input Validation Error")
    assert_served(server, endpoint)


def prompt_name(endpoint: Endpoint) -> str:
    return "inputs[0].data" if endpoint.family == "tensors" else endpoint.prompt_field


def without_prompt(endpoint: Endpoint) -> Json:
    body = endpoint.body()
    del body[endpoint.prompt_field]
    return body


@every_endpoint
def test_A02_422_missing_prompt(server: Daemon, endpoint: Endpoint) -> None:
    bodies = [without_prompt(endpoint), {**without_prompt(endpoint), endpoint.prompt_field: None}]
    for body in bodies:
        assert_error(server.post(endpoint.path, body), 422, "Input Validation Error", "must be")
    assert_served(server, endpoint)


@every_endpoint
@pytest.mark.parametrize("prompt", ["", [], 5, {}, True, [[]], [None], [1.5], ["a", 1]], ids=str)
def test_A02_422_prompt_that_is_none(server: Daemon, endpoint: Endpoint, prompt: Any) -> None:
    body = endpoint.body()
    if endpoint.family == "tensors":
        body["inputs"][0]["data"] = prompt
    elif endpoint.family == "chat":
        body["messages"][0]["content"] = prompt
        if prompt == "":  # an empty message is a message: only the list of them must not be empty
            body["messages"] = []
    else:
        body[endpoint.prompt_field] = prompt
    assert_error(server.post(endpoint.path, body), 422, "Input Validation Error")
    assert_served(server, endpoint)


WRONG_TYPES: list[tuple[str, Any]] = [
    ("top_p", "0.5"), ("top_p", True), ("top_k", 1.5), ("top_k", "1"), ("seed", 1.0), ("seed", "1"),
    ("temperature", "1"), ("temperature", False), ("repetition_penalty", []), ("top_k", {}),
]  # fmt: skip
OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("top_p", 0), ("top_p", 1.01), ("top_p", -1), ("top_k", -2), ("top_k", 2**31), ("seed", -1),
    ("seed", 2**64), ("temperature", -0.1), ("repetition_penalty", 0), ("repetition_penalty", -1),
]  # fmt: skip


@every_endpoint
@pytest.mark.parametrize(("field", "value"), [*WRONG_TYPES, *OUT_OF_RANGE], ids=str)
def test_422_wrong_type_or_range(server: Daemon, endpoint: Endpoint, field: str, value: Any) -> None:
    answer = endpoint.ask(server, **{field: value})
    assert_error(answer, 422, "Input Validation Error", f"{field}`", "must be")


@every_endpoint
@pytest.mark.parametrize("value", [0, -1, 2**31, "5", 1.5, True])
def test_422_number_of_tokens(server: Daemon, endpoint: Endpoint, value: Any) -> None:
    answer = endpoint.ask(server, max_tokens=value)
    assert_error(answer, 422, "Input Validation Error", "tokens`", "2147483647")
    assert_served(server, endpoint)


@only("tgi generate", "tgi stream", "tgi root", *TRITON, "infer", "infer_token")
@pytest.mark.parametrize("value", [[], "x", 5, True])
def test_422_parameters_no_object(server: Daemon, endpoint: Endpoint, value: Any) -> None:
    answer = server.post(endpoint.path, {**endpoint.body(), "parameters": value})
    assert_error(answer, 422, "Input Validation Error", "parameters`", "object")


FORBIDDEN: list[tuple[str, Json, str]] = [
    *((name, {"n": 2, "temperature": 0}, "temperature") for name in (*OPENAI, "vllm")),
    *((name, {"n": 2, "best_of": 1}, "best_of") for name in (*OPENAI, "vllm")),
    *((name, {"n": 2, "best_of": 3, "stream": True}, "best_of") for name in OPENAI),
    *((name, {"use_beam_search": True, "max_tokens": 129}, "max_tokens") for name in OPENAI),
    ("chat", {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    *(
        (name, {"use_beam_search": True, "response_format": {"type": "json_object"}}, "response_format")
        for name in OPENAI
    ),
    *((name, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs") for name in OPENAI),
    ("tgi stream", {"decoder_input_details": True}, "decoder_input_details"),
]


@pytest.mark.parametrize(("name", "options", "field"), FORBIDDEN, ids=str)
def test_422_forbidden_combination(server: Daemon, name: str, options: Json, field: str) -> None:
    endpoint = ENDPOINTS[name]
    stream = options.get("stream", False)
    given = {key: value for key, value in options.items() if key != "stream"}
    answer = endpoint.ask(server, stream=stream, **given)
    assert_error(answer, 422, "Input Validation Error", f"{field}`")
    assert_served(server, endpoint)


@only("infer", "infer_token")
def test_422_both_prompts(server: Daemon, endpoint: Endpoint) -> None:
    answer = server.post(endpoint.path, {**endpoint.body(), "input_id": [5]})
    assert_error(answer, 422, "Input Validation Error", "input_id`")


@only(*OPENAI, "vllm", "tgi generate", "tgi stream", "tgi root", "infer", "infer_token")
@pytest.mark.parametrize("value", ["other", "", 5, "../etc", "a" * 300])
def test_422_unknown_model(server: Daemon, endpoint: Endpoint, value: Any) -> None:
    body = endpoint.body()
    if endpoint.takes_parameters:
        body["parameters"]["adapter_id"] = value
    else:
        body["model"] = value
    field = "adapter_id`" if endpoint.takes_parameters else "model`"
    assert_error(server.post(endpoint.path, body), 422, "Input Validation Error", field)


@only(*OPENAI)
def test_422_model_is_required(server: Daemon, endpoint: Endpoint) -> None:
    body = endpoint.body()
    del body["model"]
    assert_error(server.post(endpoint.path, body), 422, "Input Validation Error", "model`")


BAD_MESSAGES: list[Any] = [
    "hi", [], ["hi"], [{}], [{"role": "user"}], [{"role": "user", "content": None}],
    [{"role": "king", "content": "x"}], [{"content": "x"}], [{"role": 5, "content": "x"}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
    [{"role": "assistant"}], [{"role": "assistant", "content": "", "tool_calls": []}],
    [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}],
    [{"role": "assistant", "tool_calls": [{"id": 1, "type": "function", "function": {"name": "f"}}]}],
    [{"role": "tool", "content": "x"}], [{"role": "tool", "content": "x", "tool_call_id": ""}],
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=str)
def test_422_messages(server: Daemon, messages: Any) -> None:
    body = {**ENDPOINTS["chat"].body(), "messages": messages}
    assert_error(server.post("/v1/chat/completions", body), 422, "Input Validation Error", "messages")


BAD_TOOLS: list[Any] = [
    "f", {}, ["f"], [{}], [{"type": "function"}], [{"function": {"name": "f"}}],
    [{"type": "tool", "function": {"name": "f"}}], [{"type": "function", "function": "f"}],
    [{"type": "function", "function": {}}], [{"type": "function", "function": {"name": ""}}],
    [{"type": "function", "function": {"name": "a b"}}],
    [{"type": "function", "function": {"name": "x" * 65}}],
]  # fmt: skip


@pytest.mark.parametrize("tools", BAD_TOOLS, ids=str)
def test_422_tools(server: Daemon, tools: Any) -> None:
    answer = ENDPOINTS["chat"].ask(server, tools=tools)
    assert_error(answer, 422, "Input Validation Error", "tools")


@pytest.mark.parametrize(
    "choice", ["always", 5, [], {"type": "function"}, {"type": "function", "function": {}}]
)
def test_422_tool_choice(server: Daemon, choice: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = ENDPOINTS["chat"].ask(server, tools=tools, tool_choice=choice)
    assert_error(answer, 422, "Input Validation Error", "tool_choice")


BAD_TENSORS: list[Json] = [
    {"inputs": []}, {"inputs": [{}, {}]}, {"inputs": "x"}, {"outputs": []}, {"outputs": None}, {"id": "a b"},
    {"inputs": [{"name": "i", "shape": [2], "datatype": "UINT32", "data": [1]}]},
    {"inputs": [{"name": "i", "shape": [1], "datatype": "INT64", "data": [1]}]},
    {"inputs": [{"name": "i", "shape": [-1], "datatype": "UINT32", "data": [1]}]},
    {"inputs": [{"name": 5, "shape": [1], "datatype": "UINT32", "data": [1]}]},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_TENSORS, ids=str)
def test_422_tensors(server: Daemon, change: Json) -> None:
    endpoint = ENDPOINTS["triton infer"]
    answer = server.post(endpoint.path, {**endpoint.body(), **change})
    assert_error(answer, 422, "Input Validation Error")


# -- 404, 405, 400 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/chat", "/v2/models", f"{MODEL}/generate/more", "/generate/"]
)
def test_404_unknown_path(server: Daemon, path: str) -> None:
    assert_error(server.post(path, {}), 404, "NotFoundError")
    assert_error(server.get(path), 404, "NotFoundError")


@only(*TRITON)
def test_404_unknown_model_in_the_path(server: Daemon, endpoint: Endpoint) -> None:
    answer = server.post(endpoint.path.replace(NAME, "other"), endpoint.body())
    assert_error(answer, 404, "NotFoundError", "model")


@pytest.mark.parametrize("seconds", ["0", "601", "1000", "x", "-1", "1.5", "٣"])
def test_404_bad_wait_time(server: Daemon, seconds: str) -> None:
    assert_error(server.manage(f"/health/timed-{quote(seconds)}"), 404, "NotFoundError", "600")


def test_404_unknown_id_to_stop(server: Daemon) -> None:
    assert_error(server.post(f"{MODEL}/stopInfer", {"id": "nobody"}), 404, "NotFoundError")


@every_endpoint
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_405_other_methods(server: Daemon, endpoint: Endpoint, method: str) -> None:
    answer = server.request(method, endpoint.path, endpoint.body())
    assert_error(answer, 405, "Method Not Allowed")
    assert "POST" in answer.headers["allow"]


def test_400_not_on_a_server_of_its_own(server: Daemon) -> None:
    assert_error(server.get("/dresult"), 400, "Bad Request")
    assert server.request("POST", "/v1/role/prefill", {}, port=server.management_port).status == 404


# -- 413, 424 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hurried(installation: Installation) -> Iterator[Daemon]:
    """Small bodies only, and a second for each request."""
    limits = {"ServerConfig": {"maxRequestLength": 1, "e2eTimeout": 1}}
    daemon = installation.daemon(merge(ENDLESS, limits)).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@every_endpoint
def test_413_body_too_large(hurried: Daemon, endpoint: Endpoint) -> None:
    body = json.dumps({**endpoint.body(), "padding": "x" * (1 << 20)}).encode()
    answer = hurried.post(endpoint.path, body)
    assert_error(answer, 413, "Request Entity Too Large")
    assert answer.json()["message"] == "Request body too large. Maximum allowed size is 1MB."
    assert_served(hurried, endpoint)


@every_endpoint
def test_424_prompt_too_long(server: Daemon, endpoint: Endpoint) -> None:
    prompt = [300] * 2049 if endpoint.family == "tensors" else "word " * 4000
    for stream in [False, True] if endpoint.streams == "by field" else [False]:
        assert_error(endpoint.ask(server, prompt, stream=stream), 424, "Generation Error", "2048")
    assert_served(server, endpoint)


@only(*TOKENS_IN)
@pytest.mark.parametrize("token", [2048, 1_000_000])
def test_424_token_outside_the_vocabulary(server: Daemon, endpoint: Endpoint, token: int) -> None:
    answer = endpoint.ask(server, [300, token])
    assert_error(answer, 424, "Generation Error", str(token), "2047")
    assert_served(server, endpoint)


@pytest.fixture(scope="module")
def cramped(installation: Installation) -> Iterator[Daemon]:
    """A cache that holds one sequence of maxSeqLen, and not several."""
    deploy = {"maxSeqLen": 512, "maxInputTokenLen": 400}
    changes = {"BackendConfig": {"ModelDeployConfig": deploy, "runtimeConfig": {"kvCacheBlockNum": 4}}}
    daemon = installation.daemon(changes).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@only(*OPENAI, "vllm")
def test_424_no_cache_for_so_many_choices(cramped: Daemon, endpoint: Endpoint) -> None:
    prompt = "word " * 200
    answer = endpoint.ask(cramped, prompt, n=8, temperature=1.0, max_tokens=200, ignore_eos=True)
    assert_error(answer, 424, "Generation Error", "cache")
    assert_served(cramped, endpoint)


# -- the trial inference -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health/timed", "/health/timed-1", "/health/timed-600"])
def test_a_trial_inference_tells_health(server: Daemon, path: str) -> None:
    answer = server.manage(path)
    assert answer.status == 200 and answer.json() == {"status": "healthy"}
    assert server.get(path).status == 404


def test_a_trial_is_not_ready_while_loading(loading: Daemon) -> None:
    assert_error(loading.get("/health/timed"), 503, "Service Unavailable", "loading")
    assert loading.get("/v1/engine-server/running-status").json() == {"status": 4, "errors": []}


def test_a_trial_fails_when_the_engine_makes_no_token(server: Daemon) -> None:
    worker = server.child("worker")
    worker.send_signal(signal.SIGSTOP)
    try:
        answer = server.manage("/health/timed-1")
    finally:
        worker.send_signal(signal.SIGCONT)
    assert_error(answer, 500, "Incomplete Generation", "Engine callback timeout", "1 s")
    assert server.manage("/health/timed-10").status == 200
    assert server.manage("/v1/engine-server/running-status").json() == {"status": 1, "errors": []}


# -- 500, 503 ------------------------------------------------------------------------------------------


@every_endpoint
def test_500_timeout(hurried: Daemon, endpoint: Endpoint) -> None:
    answer = endpoint.ask(hurried, max_tokens=LONG)
    if endpoint.streams == "always":  # it has begun: the error is its last frame
        last = json.loads(answer.body.rstrip().rsplit(b"data:", 1)[1])
        assert last["error"].startswith("Engine callback timeout")
    else:
        assert_error(answer, 500, "Incomplete Generation", "Engine callback timeout", "e2eTimeout")
    assert_served(hurried, endpoint)


@pytest.fixture(scope="module")
def stopping(installation: Installation) -> Iterator[Daemon]:
    """A daemon that has been told to stop, and still has a request to end."""
    daemon = installation.daemon(ENDLESS).start().wait_ready()
    with asked(daemon, ENDPOINTS["completions"], max_tokens=LONG):
        eventually(lambda: busy(daemon), 30.0, "the request runs")
        asker = threading.Thread(target=lambda: daemon.manage("/stopService"))
        asker.start()
        eventually(lambda: daemon.manage("/v2/health/ready").status == 503, 30.0, "a stopping server")
        yield daemon
    asker.join(30.0)
    assert daemon.wait() == 0, daemon.stderr


def busy(daemon: Daemon) -> bool:
    return bool(daemon.manage("/v1/status").json()["resource"]["runningRequestNum"])


@every_endpoint
def test_503_stopping(stopping: Daemon, endpoint: Endpoint) -> None:
    assert_error(endpoint.ask(stopping, max_tokens=1), 503, "Service Unavailable", "stopped")


@pytest.fixture(scope="module")
def loading(installation: Installation) -> Iterator[Daemon]:
    """All planes on one address, and a worker that is held in its loading."""
    daemon = installation.daemon()
    path = daemon.root / "conf" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    server = config["ServerConfig"]
    server["managementPort"] = server["metricsPort"] = server["port"]
    server["managementIpAddress"] = server["ipAddress"] = HOST
    path.write_text(json.dumps(config), encoding="utf-8")
    daemon.start()
    eventually(lambda: "role=worker" in daemon.stderr and "role=endpoint" in daemon.stderr, 30.0, "children")
    worker = daemon.child("worker")
    worker.send_signal(signal.SIGSTOP)
    eventually(lambda: listens(daemon), 30.0, "the listener")
    yield daemon
    worker.send_signal(signal.SIGCONT)
    assert daemon.stop() == 0, daemon.stderr


def listens(daemon: Daemon) -> bool:
    with contextlib.suppress(OSError):
        return daemon.get("/v2/health/live").status == 200
    return False


@every_endpoint
def test_503_not_ready(loading: Daemon, endpoint: Endpoint) -> None:
    answer = endpoint.ask(loading, max_tokens=1)
    assert_error(answer, 503, "Service Unavailable", "loading")
    assert int(answer.headers["retry-after"]) >= 1


# -- a full server ------------------------------------------------------------------------------------
# Last, because its daemon computes for as long as this module runs.


@pytest.fixture(scope="module")
def full(installation: Installation) -> Iterator[Daemon]:
    """One request runs, two wait, and there is no room for more."""
    daemon = installation.daemon(merge(ENDLESS, {"ServerConfig": {"maxLinkNum": 1}})).start().wait_ready()
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(asked(daemon, ENDPOINTS["completions"], max_tokens=LONG))
        eventually(lambda: ENDPOINTS["infer"].ask(daemon, max_tokens=1).status == 503, 30.0, "a full server")
        yield daemon
    assert daemon.stop() == 0, daemon.stderr


@every_endpoint
def test_503_full(full: Daemon, endpoint: Endpoint) -> None:
    answer = endpoint.ask(full, max_tokens=1)
    assert_error(answer, 503, "Service Unavailable", "maxLinkNum")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_busy_engine_is_healthy(full: Daemon) -> None:
    eventually(lambda: busy(full), 30.0, "the first of them runs")
    assert full.manage("/health/timed-1").json() == {"status": "healthy"}
