"""Every route over real HTTP: fields, frames, errors and limits of api.md on the running daemon."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.harness import HOST, Answer, Daemon, Json, eventually, merge

MakeDaemon = Callable[..., Daemon]
CHAT: Json = {
    "model": "mindie-tiny",
    "messages": [{"role": "user", "content": "Who are you?"}],
    "max_tokens": 12,
}
COMPLETION: Json = {"model": "mindie-tiny", "prompt": "Once upon a time", "max_tokens": 12}
INFER: Json = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 12}}
GOOD = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/infer": INFER, "/infer_token": INFER}
WORDS = ["the", "old", "king", "went", "to", "see", "a", "river", "and", "her", "small", "house"]
LONG: Json = {"model": "mindie-tiny", "prompt": "Hi", "max_tokens": 3000, "ignore_eos": True, "stream": True}
ROOM: Json = {
    "BackendConfig": {"ScheduleConfig": {"maxIterTimes": 4000}, "ModelDeployConfig": {"maxSeqLen": 4096}},
}


def assert_usage(usage: Json, completion_tokens: int) -> None:
    assert usage["completion_tokens"] == completion_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + completion_tokens
    assert len(usage["batch_size"]) == len(usage["queue_wait_time"]) == completion_tokens
    assert min(usage["batch_size"]) >= 1 and min(usage["queue_wait_time"]) >= 0


def test_models_lists_the_model(server: Daemon) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list" and listed["data"][0]["id"] == "mindie-tiny"
    assert listed["data"][0]["max_model_len"] == 2560 and listed["data"][0]["created"] <= time.time()
    assert server.get("/v1/models/mindie-tiny").json() == listed["data"][0]
    assert server.get("/v1/models/other").status == 404


def test_chat_without_stream(server: Daemon) -> None:
    answer = server.post("/v1/chat/completions", CHAT)
    assert answer.status == 200 and answer.headers["content-type"].startswith("application/json")
    assert answer.headers["requestuuid"]
    body = answer.json()
    choice = body["choices"][0]
    assert body["object"] == "chat.completion" and body["id"].startswith("endpoint_common_")
    assert choice["message"]["role"] == "assistant" and choice["message"]["tool_calls"] == []
    assert choice["message"]["content"] and choice["finish_reason"] in ("stop", "length")
    assert_usage(body["usage"], body["usage"]["completion_tokens"])
    assert body["prefill_time"] > 0 and len(body["decode_time_arr"]) == body["usage"]["completion_tokens"] - 1


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_stream_equals_the_whole_answer(server: Daemon, include_usage: bool) -> None:
    whole = server.post("/v1/chat/completions", CHAT).json()
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": include_usage}}
    *payloads, done = server.frames("/v1/chat/completions", body)
    frames: list[Any] = [json.loads(payload) for payload in payloads]
    assert done == "[DONE]" and len({frame["id"] for frame in frames}) == 1
    totals = frames.pop() if include_usage else frames[-1]
    assert_usage(totals["usage"], whole["usage"]["completion_tokens"])
    assert [frame for frame in frames if "usage" in frame] == ([] if include_usage else [frames[-1]])
    choices = [frame["choices"][0] for frame in frames]
    assert all(choice["delta"]["role"] == "assistant" for choice in choices)
    assert "".join(c["delta"]["content"] for c in choices) == whole["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert choices[0]["delta"]["content"], "the first frame must carry text: clients time it"


def test_completions_stream_equals_the_whole_answer(server: Daemon) -> None:
    whole = server.post("/v1/completions", COMPLETION).json()
    assert whole["object"] == "text_completion" and whole["choices"][0]["stop_reason"] is None
    assert whole["choices"][0]["finish_reason"] == "length"
    assert_usage(whole["usage"], 12)
    *payloads, done = server.frames("/v1/completions", {**COMPLETION, "stream": True})
    frames = [json.loads(payload) for payload in payloads]
    assert done == "[DONE]" and len(frames) == 12
    assert "".join(frame["choices"][0]["text"] for frame in frames) == whole["choices"][0]["text"]
    assert_usage(frames[-1]["usage"], 12)


def test_infer_stream_equals_the_whole_answer(server: Daemon) -> None:
    details = merge(INFER, {"parameters": {"details": True, "seed": 7}})
    whole = server.post("/infer", details).json()
    assert whole["details"] == {"finish_reason": "length", "generated_tokens": 12, "seed": 7}
    assert server.post("/infer", INFER).json() == {"generated_text": whole["generated_text"]}
    frames = [json.loads(payload) for payload in server.frames("/infer", {**details, "stream": True})]
    assert len(frames) == 12
    assert frames[0]["prefill_time"] > 0 and frames[0]["decode_time"] is None
    assert all(f["prefill_time"] is None and f["decode_time"] >= 0 for f in frames[1:])
    assert "generated_text" not in frames[0] and frames[-1]["token"]["text"] is None
    assert (
        frames[-1]["generated_text"] == whole["generated_text"] and frames[-1]["details"] == whole["details"]
    )
    assert whole["generated_text"].startswith("".join(f["token"]["text"] for f in frames[:-1]))


def test_token_ids_and_text_are_the_same_prompt(server: Daemon) -> None:
    texts = [json.loads(p) for p in server.frames("/infer", {**INFER, "stream": True})]
    ids = [token for frame in texts for token in frame["token"]["id"]]
    assert len(ids) == 12
    body = {"model": "mindie-tiny", "prompt": ids, "max_tokens": 4}
    assert server.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == 12
    assert server.post("/infer_token", {"input_id": ids}).status == 200


def test_one_frame_is_one_http_chunk(server: Daemon) -> None:
    """Clients of the original parse every chunk by itself."""
    raw = raw_exchange(
        server, "/v1/completions", {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}
    )
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head and b"chunked" in head.lower()
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            break
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert len(chunks) == 12 + 2
    assert all(chunk.startswith(b"data: ") and chunk.count(b"\n\n") == 1 for chunk in chunks)


def raw_exchange(server: Daemon, path: str, body: Json) -> bytes:
    payload = json.dumps(body).encode()
    with socket.create_connection((HOST, server.port), timeout=30) as sock:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(payload)}"
        sock.sendall(f"{head}\r\n\r\n".encode() + payload)
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    return received


PREEMPTED = "tokens have to be computed again"


def seeded(number: int) -> Json:
    """One of many sampled requests, with a prompt of 5 to 300 words."""
    words = [WORDS[(number * 7 + at * at) % len(WORDS)] for at in range((5, 40, 120, 300)[number % 4])]
    prompt = f"{number} {' '.join(words)}"
    return {**COMPLETION, "prompt": prompt, "max_tokens": 50, "temperature": 1.0, "seed": number}


def texts_of(daemon: Daemon, bodies: list[Json], at_once: int) -> list[list[str]]:
    def ask(body: Json) -> list[str]:
        return [choice["text"] for choice in daemon.post("/v1/completions", body).json()["choices"]]

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, bodies))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_seed_gives_the_same_text_whatever_else_runs(make_daemon: MakeDaemon, dtype: str) -> None:
    """Alone, among requests of all lengths with and without seeds, and through preemptions."""
    bodies = [seeded(number) for number in range(12)]
    bodies[3]["n"] = 2
    unseeded = [{**seeded(number), "seed": None} for number in range(40, 44)]
    runtime = {"dtype": dtype, "kvCacheBlockNum": 20}  # one request at a time has room, sixteen have not
    daemon = make_daemon({"BackendConfig": {"runtimeConfig": runtime}}).start().wait_ready()

    alone = texts_of(daemon, bodies, 1)
    assert len({text for texts in alone for text in texts}) == 13, "seeds and prompts make a difference"
    assert PREEMPTED not in daemon.log("mindie-llm-request")
    assert texts_of(daemon, [*unseeded, *bodies[::-1]], 16)[len(unseeded) :] == alone[::-1]
    assert PREEMPTED in daemon.log("mindie-llm-request")


def test_stop_strings_cut_the_text_and_never_leak(server: Daemon) -> None:
    text = server.post("/v1/completions", {**COMPLETION, "max_tokens": 40}).json()["choices"][0]["text"]
    stop = text[9:14]
    expected = text[: text.index(stop)]
    body = {**COMPLETION, "max_tokens": 40, "stop": ["never there", stop]}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (expected, "stop", stop)
    *payloads, _ = server.frames("/v1/completions", {**body, "stream": True})
    assert "".join(json.loads(p)["choices"][0]["text"] for p in payloads) == expected
    body["include_stop_str_in_output"] = True
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == expected + stop


def test_ignore_eos_gives_exactly_max_tokens(server: Daemon) -> None:
    body = {**CHAT, "ignore_eos": True, "max_tokens": 150}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["usage"]["completion_tokens"] == 150 and answer["choices"][0]["finish_reason"] == "length"


def test_penalties_reach_the_sampler(server: Daemon) -> None:
    plain = server.post("/v1/completions", {**COMPLETION, "max_tokens": 60}).json()["choices"][0]["text"]
    for field, value in (("repetition_penalty", 2.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        changed = server.post("/v1/completions", {**COMPLETION, "max_tokens": 60, field: value}).json()
        assert changed["choices"][0]["text"] != plain, field


@pytest.mark.parametrize(
    ("path", "change", "status", "words"),
    [
        ("/v1/chat/completions", {"messages": []}, 422, ["messages"]),
        ("/v1/chat/completions", {"model": "other"}, 422, ["model", "mindie-tiny"]),
        ("/v1/chat/completions", {"temperature": "hot"}, 422, ["temperature"]),
        ("/v1/chat/completions", {"temperature": -1}, 422, ["temperature", "-1"]),
        ("/v1/chat/completions", {"top_p": 0}, 422, ["top_p", "(0", "1]"]),
        ("/v1/chat/completions", {"max_tokens": 0}, 422, ["max_tokens", "2147483647"]),
        ("/v1/chat/completions", {"max_tokens": True}, 422, ["max_tokens"]),
        ("/v1/chat/completions", {"seed": -1}, 422, ["seed"]),
        ("/v1/chat/completions", {"n": 0}, 422, ["n", "1"]),
        ("/v1/chat/completions", {"n": 51}, 422, ["n", "50"]),
        ("/v1/chat/completions", {"n": 2, "temperature": 0}, 422, ["temperature"]),
        ("/v1/chat/completions", {"tools": [{}]}, 422, ["tools"]),
        ("/v1/completions", {"use_beam_search": True, "max_tokens": 129}, 422, ["max_tokens", "128"]),
        ("/v1/chat/completions", {"stream": 1}, 422, ["stream"]),
        ("/v1/chat/completions", {"stop": [""]}, 422, ["stop"]),
        ("/v1/chat/completions", {"temperature": 5e400}, 422, []),
        ("/v1/completions", {"prompt": ""}, 422, ["prompt"]),
        ("/v1/completions", {"prompt": []}, 422, ["prompt"]),
        ("/v1/completions", {"prompt": [1, "a"]}, 422, ["prompt"]),
        ("/v1/completions", {"prompt": [10**6]}, 424, ["1000000", "vocabulary"]),
        ("/v1/completions", {"prompt": "word " * 4000}, 424, ["tokens", "2048"]),
        ("/v1/completions", {"prompt": "word " * 4000, "stream": True}, 424, ["tokens", "2048"]),
        ("/v1/completions", {"repetition_penalty": 2.5}, 422, ["repetition_penalty", "2"]),
        ("/v1/completions", {"logprobs": 6}, 422, ["logprobs", "5"]),
        ("/infer", {"inputs": None}, 422, ["inputs"]),
        ("/infer", {"input_id": [1]}, 422, ["input_id"]),
        ("/infer", {"parameters": []}, 422, ["parameters"]),
        ("/infer", {"parameters": {"temperature": 0}}, 422, ["temperature"]),
        ("/infer", {"parameters": {"top_p": 1.0}}, 422, ["top_p"]),
        ("/infer", {"parameters": {"priority": 6}}, 422, ["priority", "5"]),
        ("/infer", {"parameters": {"timeout": 0}}, 422, ["timeout", "65535"]),
    ],
)  # fmt: skip
def test_bad_bodies_name_field_and_range_and_harm_nobody(
    server: Daemon, path: str, change: Json, status: int, words: list[str]
) -> None:
    answer = server.post(path, {**GOOD[path], **change})
    assert answer.status == status, answer.body
    body = answer.json()
    assert isinstance(body["error"], str) and body["error"] and body["error_type"] == body["type"]
    for word in words:
        assert word in body["error"], body["error"]
    assert server.post(path, GOOD[path]).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"1", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"a":' * 5000,
        b'{"model":"a","model":"b"}', b'{"model": "mindie-tiny", "prompt": "\\ud800"}',
        b'{"prompt": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(server: Daemon, raw: bytes) -> None:
    answer = server.post("/v1/completions", raw)
    assert answer.status == 422 and answer.json()["error_type"] == "Input Validation Error"
    assert server.post("/v1/completions", COMPLETION).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_A06_compressed_bodies_are_refused(server: Daemon, encoding: str) -> None:
    connection = server.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", b"no such thing", {"Content-Encoding": encoding})
        response = connection.getresponse()
        assert response.status == 422 and "Content-Encoding" in json.loads(response.read())["error"]
    assert server.post("/v1/completions", COMPLETION).status == 200


def test_null_and_unknown_fields_count_as_not_sent(server: Daemon) -> None:
    body = {
        **CHAT,
        "seed": None,
        "top_k": None,
        "stop": None,
        "temperature": None,
        "stream_options": None,
        "foo": [1],
    }
    expected = server.post("/v1/chat/completions", CHAT).json()["choices"]
    assert server.post("/v1/chat/completions", body).json()["choices"] == expected


def test_unknown_paths_methods_and_planes(server: Daemon) -> None:
    unknown = server.get("/v1/nothing")
    assert unknown.status == 404 and unknown.json()["error_type"] == "NotFoundError"
    wrong = server.get("/v1/chat/completions")
    assert wrong.status == 405 and "POST" in wrong.headers["allow"] and wrong.json()["error"]
    assert server.get("/v2/health/live").status == 404  # belongs to the management plane
    assert server.manage("/v1/models").status == 404


def test_a_body_over_the_limit_is_413(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"ServerConfig": {"maxRequestLength": 1}}).start().wait_ready()
    answer = daemon.post("/v1/completions", {**COMPLETION, "prompt": "x" * (1 << 20)})
    assert answer.status == 413
    assert answer.json()["message"] == "Request body too large. Maximum allowed size is 1MB."
    assert daemon.post("/v1/completions", COMPLETION).status == 200


def test_truncation_keeps_head_or_tail(make_daemon: MakeDaemon) -> None:
    changes = {"BackendConfig": {"ModelDeployConfig": {"truncation": True, "maxInputTokenLen": 10}}}
    daemon = make_daemon(changes).start().wait_ready()
    ids = list(range(300, 330))
    for cut in (ids, ids[:10]):
        body = {"model": "mindie-tiny", "prompt": cut, "max_tokens": 8}
        answer = daemon.post("/v1/completions", body).json()
        assert answer["usage"]["prompt_tokens"] == 10
        if cut is ids:
            expected = answer["choices"][0]["text"]
        assert answer["choices"][0]["text"] == expected


@pytest.mark.parametrize("stream", [True, False])
def test_F13_a_client_that_hangs_up_stops_the_engine(make_daemon: MakeDaemon, stream: bool) -> None:
    daemon = make_daemon(merge(ROOM, {"ServerConfig": {"maxLinkNum": 1}})).start().wait_ready()
    worker = daemon.child("worker")

    def busy() -> bool:
        before = sum(worker.cpu_times()[:2])
        time.sleep(0.3)
        return sum(worker.cpu_times()[:2]) - before > 0.15

    connection = daemon.connect()
    connection.request(
        "POST", "/v1/completions", json.dumps({**LONG, "max_tokens": 4000, "stream": stream}).encode()
    )
    eventually(busy, 30.0, "the worker computes")
    connection.close()
    start = time.monotonic()
    eventually(lambda: not busy(), 5.0, "the worker stops computing for nobody")
    assert time.monotonic() - start < 5.0
    assert daemon.post("/v1/completions", COMPLETION).status == 200  # the only place is free again


def test_one_running_two_waiting_the_fourth_is_refused(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(merge(ROOM, {"ServerConfig": {"maxLinkNum": 1}})).start().wait_ready()
    answers: list[Answer] = []

    def post() -> None:
        answers.append(daemon.post("/v1/completions", COMPLETION))

    with daemon.streaming("/v1/completions", LONG) as running:
        assert running.read1()
        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: answers, 10.0, "a refusal while one runs and two wait")
        assert [answer.status for answer in answers] == [503]
    for thread in threads:
        thread.join(60)
    assert [answer.status for answer in answers] == [503, 200, 200]
    assert answers[0].headers["retry-after"] == "1" and "maxLinkNum" in answers[0].json()["error"]


def test_the_whole_request_has_a_deadline(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(merge(ROOM, {"ServerConfig": {"e2eTimeout": 1}})).start().wait_ready()
    endless = {**LONG, "max_tokens": 4000}
    answers = [daemon.post("/v1/completions", {**endless, "stream": False})]
    if answers[0].status == 200:
        pytest.skip("this machine generates 4000 tokens within a second")
    assert answers[0].status == 500 and answers[0].json()["error"].startswith("Engine callback timeout")
    payloads = daemon.frames("/v1/completions", endless)
    assert "Engine callback timeout" in payloads[-2] and payloads[-1] == "[DONE]"
    assert daemon.post("/v1/completions", COMPLETION).status == 200


def test_no_prompt_and_no_answer_in_any_log(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.environ["MINDIE_LOG_LEVEL"] = "DEBUG"
    daemon.start().wait_ready()
    marker = "xylophone-canary-4711"
    answer = daemon.post(
        "/v1/completions", {**COMPLETION, "prompt": f"{marker} Once upon a time", "max_tokens": 30}
    )
    assert answer.status == 200
    daemon.post("/v1/completions", {**COMPLETION, "prompt": marker, "top_p": marker})
    daemon.post("/v1/completions", f'{{"prompt": "{marker}", '.encode())
    # what aiohttp cannot parse it quotes in its own log
    for head in ("Transfer-Encoding: chunked", f"Authorization: Bearer {marker}\x01\r\nContent-Length: 0"):
        with socket.create_connection((HOST, daemon.port), timeout=10) as sock:
            request = (
                f'POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{{"prompt": "{marker}"}}\r\n'
            )
            sock.sendall(request.encode())
            sock.recv(65536)
    assert daemon.stop() == 0
    text = answer.json()["choices"][0]["text"]
    logs = {path: path.read_text(encoding="utf-8") for path in daemon.root.rglob("*.log")}
    assert len(logs) > 5
    assert [path for path, log in logs.items() if marker in log or text[:20] in log] == []
