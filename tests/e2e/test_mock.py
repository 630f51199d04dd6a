"""modelInstanceType StandardMock: a daemon without weights, every dialect answering with an echo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import TINY_MODEL, Daemon, Installation, Json, merge, model_config, sse_payloads

NAME = "mindie-tiny"
MODEL = f"/v2/models/{NAME}"
PROMPT = "Once upon a time there was a mill. "
ECHO = PROMPT * 2
BYTES = len(ECHO)  # a token each, without a tokenizer
INPUTS: Json = {"inputs": PROMPT, "parameters": {"max_new_tokens": BYTES}}
TRITON: Json = {"text_input": PROMPT, "parameters": {"max_new_tokens": BYTES}}


@pytest.fixture(scope="module")
def bare(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A mock whose model directory is empty."""
    model = tmp_path_factory.mktemp("empty")
    model.chmod(0o750)
    changes = model_config(modelName=NAME, modelWeightPath=str(model), modelInstanceType="StandardMock")
    daemon = installation.daemon(changes).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


def joined(server: Daemon, path: str, body: Json, *where: str | int) -> str:
    """The text of all frames of a stream, found at `where` in each."""
    pieces = []
    for payload in server.frames(path, body):
        if payload == "[DONE]":
            continue
        value: Any = json.loads(payload)
        for step in where:
            value = value[step]
        pieces.append(value)
    return "".join(pieces)


def test_every_dialect_answers_with_the_prompt(bare: Daemon) -> None:
    completion = {"model": NAME, "prompt": PROMPT, "max_tokens": BYTES}
    assert bare.post("/v1/completions", completion).json()["choices"][0]["text"] == ECHO
    assert bare.post("/generate", {"prompt": PROMPT, "max_tokens": BYTES}).json()["text"][0].endswith(ECHO)
    assert bare.post("/generate", INPUTS).json() == {"generated_text": ECHO}
    assert bare.post("/", INPUTS).json() == [{"generated_text": ECHO}]
    assert bare.post(f"{MODEL}/generate", TRITON).json()["text_output"] == ECHO
    assert bare.post("/infer", INPUTS).json()["generated_text"] == ECHO
    assert bare.post("/infer_token", INPUTS).json()["generated_text"] == ECHO
    ids = list(PROMPT.encode())
    tensor = {"name": "input0", "shape": [1, len(ids)], "datatype": "UINT32", "data": ids}
    body = {"inputs": [tensor], "outputs": [{"name": "out"}], "parameters": {"max_new_tokens": BYTES}}
    assert bare.post(f"{MODEL}/infer", body).json()["outputs"][0]["data"] == ids * 2
    assert bare.post("/v1/tokenizer", {"inputs": PROMPT}).json()["token_number"] == len(PROMPT)


def test_every_dialect_streams_the_prompt(bare: Daemon) -> None:
    completion = {"model": NAME, "prompt": PROMPT, "max_tokens": BYTES, "stream": True}
    assert joined(bare, "/v1/completions", completion, "choices", 0, "text") == ECHO
    assert joined(bare, "/generate_stream", INPUTS, "token", "text") == ECHO
    assert joined(bare, f"{MODEL}/generate_stream", TRITON, "text_output") == ECHO
    with bare.streaming("/generate", {"prompt": PROMPT, "max_tokens": BYTES, "stream": True}) as response:
        records = [json.loads(record) for record in response.read()[:-1].split(b"\0")]
    assert "".join(record["text"][0] for record in records) == ECHO
    with bare.streaming("/infer", {**INPUTS, "stream": True}) as response:
        frames = [json.loads(payload) for payload in sse_payloads(response.read())]
    assert frames[-1]["generated_text"] == ECHO


def test_a_conversation_without_a_template_is_plain_lines(bare: Daemon) -> None:
    lines = "user: Who?\nassistant: "
    body = {"model": NAME, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2 * len(lines)}
    choice = bare.post("/v1/chat/completions", body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (lines * 2, "length")


def test_log_probabilities_and_choices(bare: Daemon) -> None:
    body = {"model": NAME, "prompt": "ab", "max_tokens": 3, "n": 2, "temperature": 1.5, "logprobs": 2}
    answer = bare.post("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "aba"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [0.0, 0.0, 0.0]
    beams = {**body, "n": 2, "temperature": 0, "use_beam_search": True}
    assert bare.post("/v1/completions", beams).json()["choices"][0]["text"] == "aba"


def test_it_is_announced_and_small(bare: Daemon) -> None:
    (line,) = [line for line in bare.stderr.splitlines() if "is an echo of its prompt" in line]
    assert "WARN" in line
    worker = bare.child("worker")
    assert worker.memory_info().rss < 100 * 2**20
    assert not [mapped.path for mapped in worker.memory_maps() if "libtorch" in mapped.path]


def test_with_the_models_files_it_speaks_the_models_tokens(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """Tokenizer, chat template and EOS are the model's; the weights are not missed."""
    model = tmp_path / "model"
    model.mkdir(mode=0o750)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_MODEL / name, model / name)  # no link: it may lie on another file system
    changes = model_config(modelName=NAME, modelWeightPath=str(model), modelInstanceType="StandardMock")
    room: Json = {"BackendConfig": {"ScheduleConfig": {"maxIterTimes": 64}}}
    server = make_daemon(merge(room, changes)).start().wait_ready()
    ids = [300, 301, 302]
    body: Json = {"model": NAME, "prompt": ids, "max_tokens": 6}
    answer = server.post("/v1/completions", body).json()
    text = server.post("/v1/completions", {**body, "max_tokens": 3}).json()["choices"][0]["text"]
    assert answer["choices"][0]["text"] == text * 2
    assert answer["usage"]["completion_tokens"] == 6
    chat: Json = {"model": NAME, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 60}
    whole = server.post("/v1/chat/completions", chat).json()["choices"][0]
    assert "user" in whole["message"]["content"]
    # the template ends each message with EOS, and an echoed one ends the answer
    assert whole["finish_reason"] == "stop"
    endless = server.post("/v1/chat/completions", {**chat, "ignore_eos": True}).json()
    assert endless["choices"][0]["finish_reason"] == "length"
    assert endless["usage"]["completion_tokens"] == 60
    assert server.stop() == 0
