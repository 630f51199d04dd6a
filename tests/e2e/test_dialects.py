"""The dialects beside OpenAI's, and what describes the server, over real HTTP."""

from __future__ import annotations

import http.client
import json
import threading
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
PROMPT = "Once upon a time"
TOKENS = 12
COMPLETION: Json = {"model": NAME, "prompt": PROMPT, "max_tokens": TOKENS}
CHAT: Json = {"model": NAME, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": TOKENS}
VLLM: Json = {"prompt": PROMPT, "max_tokens": TOKENS}
INPUTS: Json = {"inputs": PROMPT, "parameters": {"max_new_tokens": TOKENS}}
TRITON: Json = {"text_input": PROMPT, "parameters": {"max_new_tokens": TOKENS}}
LONG: Json = {"parameters": {"max_new_tokens": 4000}}
ROOM: Json = {
    "BackendConfig": {"ScheduleConfig": {"maxIterTimes": 4000}, "ModelDeployConfig": {"maxSeqLen": 4096}},
}


def tensor(ids: list[int], **parameters: Any) -> Json:
    data = {"name": "input0", "shape": [1, len(ids)], "datatype": "UINT32", "data": ids}
    return {"id": "tensor-1", "inputs": [data], "outputs": [{"name": "out"}], "parameters": parameters}


GOOD: dict[str, Json] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/generate": VLLM,
    "/generate_stream": INPUTS,
    "/": INPUTS,
    f"{MODEL}/generate": TRITON,
    f"{MODEL}/generate_stream": TRITON,
    f"{MODEL}/infer": tensor([300, 301, 302], max_new_tokens=TOKENS),
    "/infer": INPUTS,
    "/infer_token": INPUTS,
    "/v1/tokenizer": {"inputs": PROMPT},
}


@pytest.fixture(scope="module")
def endless(installation: Installation) -> Iterator[Daemon]:
    """A daemon whose answers only their length ends, in dialects without `ignore_eos` too."""
    model = model_config(modelName=NAME, modelWeightPath=str(TINY_MODEL), ignore_eos=True)
    daemon = installation.daemon(merge(ROOM, model)).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="module")
def text(server: Daemon) -> str:
    """What the model greedily says after PROMPT, in TOKENS tokens."""
    whole: str = server.post("/v1/completions", COMPLETION).json()["choices"][0]["text"]
    assert whole
    return whole


def raw_stream(server: Daemon, path: str, body: Json) -> bytes:
    with server.streaming(path, body) as response:
        raw = response.read()
        assert response.status == 200, raw
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return raw


def frames(server: Daemon, path: str, body: Json) -> list[Json]:
    return [json.loads(payload) for payload in sse_payloads(raw_stream(server, path, body))]


def nul_records(server: Daemon, body: Json) -> list[list[str]]:
    raw = raw_stream(server, "/generate", {**body, "stream": True})
    assert raw.endswith(b"\0")
    return [json.loads(record)["text"] for record in raw[:-1].split(b"\0")]


def native_frames(server: Daemon, path: str, body: Json) -> list[Json]:
    return frames(server, path, {**body, "stream": True})


def prompt_and(text: str) -> str:
    return PROMPT + (text if text.startswith(" ") else f" {text}")


# -- vLLM --------------------------------------------------------------------------------------------


def test_vllm_whole_and_streamed(server: Daemon, text: str) -> None:
    assert server.post("/generate", VLLM).json() == {"text": [prompt_and(text)]}
    records = nul_records(server, VLLM)
    assert len(records) == TOKENS and all(len(record) == 1 for record in records)
    assert "".join(record[0] for record in records) == text


def test_vllm_choices_have_a_place_in_every_record(server: Daemon) -> None:
    body = {**VLLM, "n": 2, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    whole = server.post("/generate", body).json()["text"]
    assert len(set(whole)) == 2
    records = nul_records(server, body)
    assert all(len(record) == 2 for record in records)
    assert [prompt_and("".join(pieces)) for pieces in zip(*records, strict=True)] == whole
    best = server.post("/generate", {**body, "n": 1, "best_of": 4}).json()["text"]
    assert len(best) == 1


def test_generate_is_vllms_with_a_prompt_and_tgis_without(server: Daemon) -> None:
    assert "text" in server.post("/generate", {**INPUTS, **VLLM}).json()
    assert "generated_text" in server.post("/generate", {**INPUTS, "prompt": None}).json()
    assert server.post("/generate", {}).status == 422


# -- TGI ---------------------------------------------------------------------------------------------


def test_tgi_whole_answers(server: Daemon, text: str) -> None:
    assert server.post("/generate", INPUTS).json() == {"generated_text": text}
    assert server.post("/generate", {**INPUTS, "stream": True}).json() == {"generated_text": text}
    assert server.post("/", INPUTS).json() == [{"generated_text": text}]


@pytest.mark.parametrize(("path", "more"), [("/generate_stream", {}), ("/", {"stream": True})])
def test_tgi_streams(server: Daemon, text: str, path: str, more: Json) -> None:
    sent = frames(server, path, {**merge(INPUTS, {"parameters": {"details": True, "seed": 7}}), **more})
    assert len(sent) == TOKENS
    assert "".join(frame["token"]["text"] for frame in sent) == text
    assert all(len(frame["token"]["id"]) == 1 for frame in sent)
    assert all(frame["generated_text"] is None and frame["details"] is None for frame in sent[:-1])
    assert sent[-1]["generated_text"] == text
    details = sent[-1]["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", TOKENS, 7)
    assert frames(server, path, {**INPUTS, **more})[-1]["details"] is None


def test_tgi_details_agree_with_the_stream(server: Daemon, text: str) -> None:
    body = merge(INPUTS, {"parameters": {"details": True, "seed": 7}})
    answer = server.post("/generate", body).json()
    details = answer["details"]
    assert answer["generated_text"] == text
    assert details["prompt_tokens"] == prompt_tokens(server, PROMPT) and details["prefill"] == []
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", TOKENS, 7)
    ids = [frame["token"]["id"][0] for frame in frames(server, "/generate_stream", body)]
    assert [token["id"] for token in details["tokens"]] == ids


def test_tgi_truncate_keeps_the_last_tokens_of_the_prompt(server: Daemon) -> None:
    def details(**parameters: Any) -> Json:
        body = merge(INPUTS, {"parameters": {"decoder_input_details": True, **parameters}})
        answer: Json = server.post("/generate", body).json()
        return {**answer["details"], "text": answer["generated_text"]}

    full = details()
    prompt = [token["id"] for token in full["prefill"]]
    assert len(prompt) == full["prompt_tokens"] > 2
    cut = details(truncate=2)
    assert [token["id"] for token in cut["prefill"]] == prompt[-2:] and cut["prompt_tokens"] == 2
    body = {**COMPLETION, "prompt": prompt[-2:]}
    assert cut["text"] == server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert {**details(truncate=len(prompt) + 5), "seed": 0} == {**full, "seed": 0}


def test_tgi_return_full_text(server: Daemon, text: str) -> None:
    body = merge(INPUTS, {"parameters": {"return_full_text": True}})
    assert server.post("/generate", body).json() == {"generated_text": f"{PROMPT} {text}"}
    sent = frames(server, "/generate_stream", body)
    assert sent[-1]["generated_text"] == f"{PROMPT} {text}"
    assert "".join(frame["token"]["text"] for frame in sent) == text


# -- Triton ------------------------------------------------------------------------------------------


def test_triton_whole_answer(server: Daemon, text: str) -> None:
    answer = server.post(f"{MODEL}/generate", {**TRITON, "id": "a-1"}).json()
    assert answer == {"id": "a-1", "model_name": NAME, "model_version": None, "text_output": text}
    body = merge(TRITON, {"parameters": {"details": True, "perf_stat": True}})
    details = server.post(f"{MODEL}/generate", body).json()["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", TOKENS)
    assert [token_id for token_id, _ in details["perf_stat"]] == streamed_ids(server, INPUTS)
    assert all(type(ms) is int for _, ms in details["perf_stat"])
    assert len(details["batch_size"]) == len(details["queue_wait_time"]) == TOKENS


def test_triton_stream(server: Daemon, text: str) -> None:
    body = merge(TRITON, {"id": "a-2", "parameters": {"details": True}})
    raw = raw_stream(server, f"{MODEL}/generate_stream", body)
    assert all(frame.startswith(b"data:{") for frame in raw[:-2].split(b"\n\n"))
    sent = [json.loads(payload) for payload in sse_payloads(raw)]
    assert {frame["id"] for frame in sent} == {"a-2"}
    assert "".join(frame["text_output"] for frame in sent) == text
    assert [frame["details"]["generated_tokens"] for frame in sent] == list(range(1, TOKENS + 1))
    assert ["finish_reason" in frame["details"] for frame in sent] == [False] * (TOKENS - 1) + [True]
    assert sent[0]["prefill_time"] > 0 and sent[0]["decode_time"] is None
    assert all(frame["prefill_time"] is None and frame["decode_time"] >= 0 for frame in sent[1:])


def streamed_ids(server: Daemon, body: Json) -> list[int]:
    sent = native_frames(server, "/infer_token", body)
    return [token for frame in sent for token in frame["token"]["id"]]


def test_triton_tensors_in_and_out(server: Daemon) -> None:
    prompt = streamed_ids(server, INPUTS)
    expected = streamed_ids(server, {"input_id": prompt, "parameters": {"max_new_tokens": TOKENS}})
    answer = server.post(f"{MODEL}/infer", tensor(prompt, max_new_tokens=TOKENS)).json()
    output = {"name": "out", "shape": [1, len(expected)], "datatype": "UINT32", "data": expected}
    assert answer == {"id": "tensor-1", "outputs": [output]}


@pytest.mark.parametrize("route", ["generate", "generate_stream", "infer", "stopInfer"])
def test_a_wrong_model_in_the_path_is_wrong_whatever_the_body_says(server: Daemon, route: str) -> None:
    for body in (b"{broken", b"", TRITON):
        answer = server.post(f"/v2/models/other/{route}", body)
        assert answer.status == 404 and answer.json()["error_type"] == "NotFoundError"
    assert server.post(f"{MODEL}/{route}", b"{broken").status == 422


def first_frame(response: http.client.HTTPResponse) -> bytes:
    """The bytes up to the first blank line."""
    raw = b""
    while not raw.endswith(b"\n\n"):
        raw += response.read(1)
    return raw


def test_stop_infer_ends_a_stream_with_what_it_has(endless: Daemon) -> None:
    body = {**TRITON, **LONG, "id": "mine", "details": True}
    with endless.streaming(f"{MODEL}/generate_stream", body) as response:
        raw = first_frame(response)
        for other in ("yours", "min"):
            assert endless.post(f"{MODEL}/stopInfer", {"id": other}).status == 404
        stopped = endless.post(f"{MODEL}/stopInfer", {"id": "mine"})
        assert stopped.status == 200 and stopped.json() == {"id": "mine"}
        sent = [json.loads(payload) for payload in sse_payloads(raw + response.read())]
    assert sent[-1]["details"]["finish_reason"] == "stop_sequence"
    assert all("finish_reason" not in frame["details"] for frame in sent[:-1])
    assert len(sent) - 1 == sent[-1]["details"]["generated_tokens"] < 4000  # the last one is no token
    assert endless.post(f"{MODEL}/stopInfer", {"id": "mine"}).status == 404
    idle_again(endless)


@pytest.mark.parametrize("route", ["generate", "infer"])
def test_stop_infer_ends_a_whole_answer(endless: Daemon, route: str) -> None:
    body = {**(TRITON if route == "generate" else tensor([300, 301])), **LONG, "id": "mine", "details": True}
    answers: list[Json] = []
    thread = threading.Thread(target=lambda: answers.append(endless.post(f"{MODEL}/{route}", body).json()))
    thread.start()
    stop = {"id": "mine"}
    eventually(lambda: endless.post(f"{MODEL}/stopInfer", stop).status == 200, 30.0, "the request runs")
    thread.join(30.0)
    (answer,) = answers
    assert answer["id"] == "mine"
    if route == "generate":
        assert answer["details"]["finish_reason"] == "stop_sequence"
    else:
        assert answer["outputs"][0]["shape"][1] < 4000
    idle_again(endless)


@pytest.mark.parametrize(
    "body", [b"{", {}, {"id": None}, {"id": 5}, {"id": ""}, {"id": "a b"}, {"id": "x" * 257}]
)
def test_stop_infer_needs_an_id(server: Daemon, body: Json | bytes) -> None:
    assert server.post(f"{MODEL}/stopInfer", body).status == 422


# -- token counts and metadata -----------------------------------------------------------------------


def prompt_tokens(server: Daemon, prompt: str) -> int:
    body = {**COMPLETION, "prompt": prompt, "max_tokens": 1}
    count: int = server.post("/v1/completions", body).json()["usage"]["prompt_tokens"]
    return count


@pytest.mark.parametrize("prompt", [PROMPT, " ", "what is your name?", "naïve 你好 🙂", "word " * 300])
def test_the_tokenizer_counts_what_a_completion_counts(server: Daemon, prompt: str) -> None:
    answer = server.post("/v1/tokenizer", {"inputs": prompt}).json()
    assert answer["token_number"] == prompt_tokens(server, prompt) >= len(answer["tokens"])
    assert "".join(answer["tokens"]) == prompt
    bare = server.post("/v1/tokenizer", {"inputs": prompt, "do_decode": False}).json()
    assert bare == {"token_number": answer["token_number"], "tokens": []}


def test_triton_metadata(server: Daemon) -> None:
    about = server.get("/v2").json()
    assert (about["name"], about["version"]) == ("MindIE Server", "1.0.0")
    assert all(type(value) is int for value in about["extensions"].values())
    assert about["extensions"]["max_iter_times"] == 512
    model = server.get(MODEL).json()
    assert (model["name"], model["platform"]) == (NAME, "MindIE Server")
    for side, name in (("inputs", "input0"), ("outputs", "output0")):
        assert model[side] == [{"name": name, "shape": [-1], "datatype": "UINT32"}]
    config = server.get(f"{MODEL}/config").json()
    assert (config["model_name"], config["max_seq_len"], config["world_size"]) == (NAME, 2560, 1)
    assert config["model_weight_path"] == NAME and config["input_datatype"] == "UINT32"
    for path in ("/v2/models/other", "/v2/models/other/config"):
        assert server.get(path).status == 404


# -- the management plane ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"])
def test_a_healthy_service_has_nothing_to_say(server: Daemon, path: str) -> None:
    answer = server.manage(path)
    assert answer.status == 200 and answer.body == b""
    assert server.get(path).status == 404  # not on the business plane


def test_info_and_config_agree(server: Daemon) -> None:
    info = server.manage("/info").json()
    (model,) = info["models"]
    assert (model["model_id"], model["model_device_type"]) == (NAME, "cpu")
    assert model["model_pipeline_tag"] == "text-generation"
    config = server.manage("/v1/config").json()
    assert config["modelName"] == NAME and all(type(v) is int for k, v in config.items() if k != "modelName")
    assert model["max_total_tokens"] == config["maxSeqLen"] == 2560
    assert info["max_input_length"] < config["maxSeqLen"] and config["maxOutputLen"] == 512
    slots = server.manage(f"{MODEL}/getSlotCount").json()
    assert 0 < slots["available_tokens_length"] == info["max_batch_total_tokens"]
    assert slots["free_slots"] == slots["total_slots"] > 0


@pytest.mark.parametrize("route", ["ready", "getSlotCount"])
def test_the_management_plane_knows_one_model(server: Daemon, route: str) -> None:
    assert server.manage(f"/v2/models/other/{route}").status == 404


def test_status_of_an_idle_service(server: Daemon) -> None:
    status = server.manage("/v1/status").json()
    assert status["service"] == {"roleStatus": "RoleReady", "currentRole": "none"}
    assert status["linkStatus"] == {"peers": []}
    idle_again(server)
    more = server.manage("/v2/status").json()["resource"]
    assert more.keys() >= server.manage("/v1/status").json()["resource"].keys()
    assert more["maxAvailNpuBlockNum"] == more["totalAvailNpuBlockNum"] == more["totalNpuBlockNums"]
    assert more["totalAvailNpuSlotsNum"] == more["availSlotsNum"]


def load(daemon: Daemon) -> tuple[Json, Json]:
    """`resource` of the status, and the slot count."""
    return daemon.manage("/v1/status").json()["resource"], daemon.manage(f"{MODEL}/getSlotCount").json()


def idle_again(daemon: Daemon) -> None:
    """Nothing runs or waits, and every block and slot is free."""

    def idle() -> bool:
        resource, slots = load(daemon)
        return bool(
            resource["runningRequestNum"] == resource["waitingRequestNum"] == 0
            and resource["freeNpuBlockNums"] == resource["totalNpuBlockNums"] > 0
            and slots["free_slots"] == slots["total_slots"]
        )

    eventually(idle, 10.0, "an idle service")


def test_status_sees_a_running_request(endless: Daemon) -> None:
    with endless.streaming(f"{MODEL}/generate_stream", {**TRITON, **LONG}) as response:
        first_frame(response)

        def seen() -> bool:
            resource, slots = load(endless)
            return bool(
                resource["runningRequestNum"] == 1
                and resource["freeNpuBlockNums"] < resource["totalNpuBlockNums"]
                and slots["free_slots"] == slots["total_slots"] - 1
            )

        eventually(seen, 10.0, "one running request")
    idle_again(endless)


# -- all of them -------------------------------------------------------------------------------------


def test_the_dialects_say_the_same(server: Daemon, text: str) -> None:
    """One greedy request: the same text in every dialect, and joined from every stream."""
    whole = [
        server.post("/generate", VLLM).json()["text"][0][-len(text) :],
        server.post("/generate", INPUTS).json()["generated_text"],
        server.post("/", INPUTS).json()[0]["generated_text"],
        server.post(f"{MODEL}/generate", TRITON).json()["text_output"],
        server.post("/infer", INPUTS).json()["generated_text"],
        server.post("/infer_token", INPUTS).json()["generated_text"],
    ]
    *openai, _ = server.frames("/v1/completions", {**COMPLETION, "stream": True})
    streamed = [
        "".join(json.loads(frame)["choices"][0]["text"] for frame in openai),
        "".join(record[0] for record in nul_records(server, VLLM)),
        "".join(frame["token"]["text"] for frame in frames(server, "/generate_stream", INPUTS)),
        "".join(frame["token"]["text"] for frame in frames(server, "/", {**INPUTS, "stream": True})),
        "".join(frame["text_output"] for frame in frames(server, f"{MODEL}/generate_stream", TRITON)),
        *(native_frames(server, path, INPUTS)[-1]["generated_text"] for path in ("/infer", "/infer_token")),
    ]
    assert {*whole, *streamed} == {text}


BAD: list[tuple[str, Json, str]] = [
    ("/v1/chat/completions", {"n": 0}, "n"),
    ("/v1/completions", {"min_p": 2}, "min_p"),
    ("/v1/completions", {"prompt_logprobs": 21}, "prompt_logprobs"),
    ("/generate", {"best_of": 0}, "best_of"),
    ("/generate", {"prompt": None}, "inputs"),
    ("/generate_stream", {"parameters": {"decoder_input_details": True}}, "decoder_input_details"),
    ("/generate_stream", {"parameters": {"truncate": 0}}, "truncate"),
    ("/", {"stream": 1}, "stream"),
    (f"{MODEL}/generate", {"id": "a b"}, "id"),
    (f"{MODEL}/generate_stream", {"parameters": {"top_k": -1}}, "top_k"),
    (f"{MODEL}/infer", {"outputs": []}, "outputs"),
    ("/infer", {"parameters": {"temperature": 0}}, "temperature"),
    ("/infer_token", {"input_id": [1]}, "input_id"),
    ("/v1/tokenizer", {"inputs": ""}, "inputs"),
]


@pytest.mark.parametrize(("path", "change", "word"), BAD)
def test_a_bad_body_is_told_apart_and_harms_nobody(
    server: Daemon, path: str, change: Json, word: str
) -> None:
    for body in ({**GOOD[path], **change}, b"[1]"):
        answer = server.post(path, body)
        assert answer.status == 422, answer.body
        error = answer.json()
        assert error["error_type"] == error["type"] == "Input Validation Error"
        assert isinstance(body, bytes) or f"{word}`" in error["error"]
    assert server.post(path, GOOD[path]).status == 200
