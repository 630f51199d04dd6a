"""Speculative decoding on the running server: other steps, the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.e2e.test_metrics import scrape
from tests.harness import TINY_MODEL, Daemon, Json, eventually, merge, model_config, sse_payloads

MakeDaemon = Callable[..., Daemon]
PLUGIN = {"plugin_type": "memory_decoding", "decoding_length": 16, "dynamic_algo": True}
LINE = "Tom has 3 apples and buys 4 more. Tom has 3 apples and buys 4 more. "
PROMPTS = (LINE * 4, "1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2,", "Question: What is 2 + 3?\nAnswer:")
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "stop": ["more"]},
    {"temperature": 0.9, "seed": 7, "n": 2},
    {"temperature": 0, "logprobs": 1},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"temperature": 0, "max_tokens": 5},
)


def config(plugin: Json) -> Json:
    changes: Json = {
        "BackendConfig": {
            "ModelDeployConfig": {"speculationGamma": 16},
            "runtimeConfig": {"dtype": "float32"},
        }
    }
    params = json.dumps(plugin) if plugin else ""
    model = model_config(plugin_params=params, modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL))
    return merge(model, changes)


def ask(daemon: Daemon, prompt: str, asked: dict[str, Any]) -> list[Json]:
    """The text, token and log-probability parts of every choice."""
    body = {"model": "mindie-tiny", "prompt": prompt, "max_tokens": 60, "ignore_eos": True, **asked}
    answer = daemon.post("/v1/completions", json.dumps(body).encode())
    assert answer.status == 200, answer.body
    return [
        {key: choice[key] for key in ("text", "finish_reason", "logprobs")}
        for choice in answer.json()["choices"]
    ]


def guesses(daemon: Daemon) -> tuple[float, float]:
    """Tokens guessed, and right ones."""
    told = scrape(daemon)
    return told["mindie_guessed_tokens_total"], told["mindie_right_guesses_total"]


def test_answers_are_those_without_guesses(make_daemon: MakeDaemon) -> None:
    cases = [(prompt, asked) for prompt in PROMPTS for asked in ASKED]
    plain = make_daemon(config({})).start().wait_ready()
    want = [ask(plain, *case) for case in cases]
    assert guesses(plain) == (0, 0)
    plain.stop()
    speculative = make_daemon(config(PLUGIN)).start().wait_ready()
    for case, answer in zip(cases, want, strict=True):
        assert ask(speculative, *case) == answer, case
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: ask(speculative, *case), cases)) == want
    eventually(lambda: 0 < guesses(speculative)[1] <= guesses(speculative)[0], 10.0, "guesses are counted")
    assert speculative.stop() == 0 and "died" not in speculative.stderr


def test_a_stream_has_a_frame_for_each_token(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(config(PLUGIN)).start().wait_ready()
    body = {"prompt": PROMPTS[1], "max_tokens": 40, "temperature": 0, "stream": True, "ignore_eos": True}
    with daemon.streaming("/v1/completions", {"model": "mindie-tiny", **body}) as response:
        frames = [json.loads(payload) for payload in sse_payloads(response.read()) if payload != "[DONE]"]
    texts = [choice["text"] for frame in frames for choice in frame["choices"]]
    (whole,) = ask(daemon, PROMPTS[1], {"temperature": 0, "max_tokens": 40})
    assert "".join(texts) == whole["text"] and len(texts) >= 40
