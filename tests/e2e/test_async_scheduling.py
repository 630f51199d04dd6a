"""MINDIE_ASYNC_SCHEDULING_ENABLE on the running server: the same answers, but for what it refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.test_metrics import scrape
from tests.harness import TINY_MODEL, Daemon, Installation, Json, eventually, merge, model_config
from tests.streams import LONG, LONG_CONFIG, Stream

MakeDaemon = Callable[..., Daemon]
VARIABLE = "MINDIE_ASYNC_SCHEDULING_ENABLE"
MODEL: Json = {"modelName": "mindie-tiny", "modelWeightPath": str(TINY_MODEL)}
FLOAT32: Json = merge(LONG_CONFIG, {"BackendConfig": {"runtimeConfig": {"dtype": "float32"}}})
# prompts in pieces beside what decodes, blocks that are found again, and few enough of them to give way
CROWDED: Json = merge(
    merge(
        FLOAT32,
        model_config(
            **MODEL, plugin_params=json.dumps({"plugin_type": "prefix_cache,splitfuse"}), cpuMemSize=1
        ),
    ),
    {
        "BackendConfig": {
            "ScheduleConfig": {
                "templateType": "Mix",
                "cacheBlockSize": 16,
                "maxPreemptCount": 1,
                "maxIterTimes": 512,
            },
            "ModelDeployConfig": {"maxSeqLen": 512, "maxInputTokenLen": 400},
            "runtimeConfig": {"kvCacheBlockNum": 34},
        }
    },
)
PROMPTS = ("Once upon a time", "Question: What is 2 + 3?\nAnswer:", "1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2," * 6)
SCHEMA: Json = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "max_tokens": 1},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.2, "seed": 8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0, "stop": ["e"]},
    {"temperature": 0, "ignore_eos": True, "stop_token_ids": list(range(300, 400))},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0, "logprobs": 2, "echo": True},
    {"temperature": 1.0, "seed": 5, "min_tokens": 10, "logit_bias": {"65": 3}},
    {
        "temperature": 1.0,
        "seed": 2,
        "max_tokens": 80,
        "response_format": {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}},
    },
)
CASES = [(prompt, asked) for prompt in PROMPTS for asked in ASKED]


def ask(daemon: Daemon, prompt: str, asked: dict[str, Any]) -> Json:
    """The text, token, log-probability and usage parts of the answer."""
    body = {"model": "mindie-tiny", "prompt": prompt, "max_tokens": 40, **asked}
    answer = daemon.post("/v1/completions", body)
    assert answer.status == 200, answer.body
    (choice,) = answer.json()["choices"]
    told: Json = {key: choice[key] for key in ("text", "finish_reason", "logprobs")}
    return {**told, "tokens": answer.json()["usage"]["completion_tokens"]}


def free_blocks(daemon: Daemon) -> int:
    return int(daemon.manage("/v1/status").json()["resource"]["availBlockNum"])


@pytest.fixture(scope="module")
def want(installation: Installation) -> list[Json]:
    """What a server says that does one step after the other."""
    plain = installation.daemon(FLOAT32).start().wait_ready()
    told = [ask(plain, *case) for case in CASES]
    assert plain.stop() == 0
    return told


@pytest.fixture(scope="module")
def overlapped(installation: Installation) -> Iterator[Daemon]:
    daemon = installation.daemon(FLOAT32)
    daemon.environ[VARIABLE] = "1"
    daemon.start().wait_ready()
    assert f"{VARIABLE}=1" in daemon.stderr
    yield daemon
    assert daemon.stop() == 0


def test_answers_are_those_of_one_step_at_a_time(overlapped: Daemon, want: list[Json]) -> None:
    """Alone and in company, and nothing is left behind."""
    untouched = free_blocks(overlapped)
    for case, answer in zip(CASES, want, strict=True):
        assert ask(overlapped, *case) == answer, case
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda case: ask(overlapped, *case), CASES)) == want
    assert "died" not in overlapped.stderr
    eventually(lambda: free_blocks(overlapped) == untouched, 10.0, "all blocks are free")


def test_answers_are_the_same_while_others_hang_up(overlapped: Daemon, want: list[Json]) -> None:
    untouched = free_blocks(overlapped)
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda case: ask(overlapped, *case), CASES)
        for _ in range(8):
            with overlapped.streaming("/v1/completions", LONG) as response:
                assert response.read1()
        assert list(answers) == want
    eventually(lambda: free_blocks(overlapped) == untouched, 10.0, "all blocks are free")


def test_a_stream_tells_every_token_once(overlapped: Daemon) -> None:
    body = {"model": "mindie-tiny", "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0}
    frames = [
        json.loads(each) for each in overlapped.frames("/v1/completions", {**body, "stream": True})[:-1]
    ]
    texts = [choice["text"] for frame in frames for choice in frame["choices"]]
    assert "".join(texts) == ask(overlapped, PROMPTS[0], {"temperature": 0})["text"]


@pytest.mark.parametrize(
    ("route", "members", "field"),
    [
        ("/v1/completions", {"prompt": "a", "n": 2}, "n"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}, "n"),
        ("/generate", {"prompt": "a", "n": 2}, "n"),
    ],
)
def test_several_answers_to_a_prompt_are_refused(
    overlapped: Daemon, route: str, members: Json, field: str
) -> None:
    answer = overlapped.post(route, {"model": "mindie-tiny", "max_tokens": 3, **members})
    assert 400 <= answer.status < 500
    assert f"`{field}`".encode() in answer.body and f"{VARIABLE}=1".encode() in answer.body


def test_streams_go_on_with_the_same_bytes_after_the_worker_died(overlapped: Daemon) -> None:
    body = {**LONG, "max_tokens": 400, "temperature": 0.7, "seed": 5, "repetition_penalty": 1.1}
    undisturbed = texts_of(overlapped.frames("/v1/completions", body))
    streams = [Stream(overlapped, body) for _ in range(4)]
    assert all(stream.started.wait(60) for stream in streams)
    overlapped.child("worker").send_signal(signal.SIGKILL)
    for stream in streams:
        stream.join(60)
        payloads = [line[6:] for line in stream.received.decode().splitlines() if line.startswith("data: ")]
        assert stream.error is None and texts_of(payloads) == undisturbed
    assert ask(overlapped, "a", {"temperature": 0})["tokens"] > 0


def texts_of(payloads: list[str]) -> str:
    assert payloads[-1] == "[DONE]"
    frames = [json.loads(payload) for payload in payloads[:-1]]
    assert not any("error" in frame for frame in frames)
    return "".join(choice["text"] for frame in frames for choice in frame["choices"])


def test_answers_are_the_same_where_requests_give_way(make_daemon: MakeDaemon, want: list[Json]) -> None:
    daemon = make_daemon(CROWDED)
    daemon.environ[VARIABLE] = "1"
    daemon.start().wait_ready()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda case: ask(daemon, *case), CASES)) == want
    eventually(lambda: scrape(daemon)["num_preemptions_total"] > 0, 10.0, "somebody has given way")
    assert daemon.stop() == 0 and "died" not in daemon.stderr
