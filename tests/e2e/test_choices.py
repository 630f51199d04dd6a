"""Several answers to one prompt, beams and log-probabilities, against transformers on the shipped model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.harness import TINY_MODEL, Daemon, Installation, Json

MakeDaemon = Callable[..., Daemon]
PROMPT = "Once upon a time"
PLAIN: Json = {"model": "mindie-tiny", "prompt": PROMPT, "max_tokens": 24}
CHAT: Json = {"model": "mindie-tiny", "messages": [{"role": "user", "content": "Who are you?"}]}
FULL: Json = {**PLAIN, "ignore_eos": True}
FP32: Json = {
    "BackendConfig": {"runtimeConfig": {"dtype": "float32"}, "ScheduleConfig": {"cacheBlockSize": 16}}
}


@pytest.fixture(scope="module")
def server(installation: Installation) -> Iterator[Daemon]:
    daemon = installation.daemon(FP32).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY_MODEL)


def prompts(count: int) -> list[str]:
    lines = (TINY_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines[:count]]


@pytest.mark.parametrize(("width", "max_tokens"), [(2, 24), (4, 24), (4, 60), (5, 7), (3, 1)])
def test_beam_search_equals_transformers(
    server: Daemon, reference: tuple[Any, Any], width: int, max_tokens: int
) -> None:
    model, tokenizer = reference
    for prompt in [PROMPT, *prompts(5)]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            expected = model.generate(
                ids, num_beams=width, num_return_sequences=width, do_sample=False, max_new_tokens=max_tokens
            )
        texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in expected]
        body = {**PLAIN, "prompt": prompt, "max_tokens": max_tokens, "use_beam_search": True, "n": width}
        answer = server.post("/v1/completions", body).json()
        assert [choice["text"] for choice in answer["choices"]] == texts, prompt


@pytest.mark.parametrize(
    ("asked", "generation"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
        ({"min_tokens": 20}, {"min_new_tokens": 20}),
        (
            {"repetition_penalty": 1.2, "min_tokens": 9, "min_p": 0.9},
            {"repetition_penalty": 1.2, "min_new_tokens": 9},
        ),
        ({"logit_bias": {"300": 4.0, "265": -5.0}}, {"sequence_bias": {(300,): 4.0, (265,): -5.0}}),
    ],
)
def test_steered_beams_equal_transformers(
    server: Daemon, reference: tuple[Any, Any], asked: Json, generation: dict[str, Any]
) -> None:
    """`min_p` filters what is drawn, and beams draw nothing."""
    model, tokenizer = reference
    for prompt in [PROMPT, *prompts(3)]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            expected = model.generate(
                ids, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=24, **generation
            )
        texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in expected]
        body = {**PLAIN, "prompt": prompt, "use_beam_search": True, "n": 3, "logprobs": 1, **asked}
        choices = server.post("/v1/completions", body).json()["choices"]
        assert [choice["text"] for choice in choices] == texts, prompt
        for choice in choices:  # what is told is the model's own all the same
            values = choice["logprobs"]["token_logprobs"]
            tops = [max(top.values()) for top in choice["logprobs"]["top_logprobs"]]
            assert all(value <= best <= 0 for value, best in zip(values, tops, strict=True))


def test_frequency_and_presence_penalties_steer_beams(server: Daemon) -> None:
    body = {**FULL, "use_beam_search": True, "n": 2, "max_tokens": 40}
    plain = server.post("/v1/completions", {**body, "prompt": "a a a a a a a"}).json()["choices"][0]["text"]
    for penalty in ("frequency_penalty", "presence_penalty"):
        steered = {**body, "prompt": "a a a a a a a", penalty: 2.0}
        text = server.post("/v1/completions", steered).json()["choices"][0]["text"]
        assert len(set(text.split())) > len(set(plain.split())), penalty


def test_beams_survive_preemption(make_daemon: MakeDaemon, server: Daemon) -> None:
    from concurrent.futures import ThreadPoolExecutor

    config = {
        "BackendConfig": {
            "runtimeConfig": {"dtype": "float32", "kvCacheBlockNum": 32},
            "ScheduleConfig": {"cacheBlockSize": 16, "maxPrefillTokens": 2048, "maxIterTimes": 80},
            "ModelDeployConfig": {"maxSeqLen": 320, "maxInputTokenLen": 256},
        }
    }
    small = make_daemon(config).start().wait_ready()
    bodies = [
        {**PLAIN, "prompt": prompt, "max_tokens": 60, "use_beam_search": index % 2 == 0, "n": 3, "seed": 5,
         **({} if index % 2 == 0 else {"temperature": 0.8})}
        for index, prompt in enumerate(prompts(12))
    ]  # fmt: skip

    def texts(daemon: Daemon, body: Json) -> list[str]:
        return [choice["text"] for choice in daemon.post("/v1/completions", body).json()["choices"]]

    expected = [texts(server, body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(lambda body: texts(small, body), bodies)) == expected
    assert "preempted" in small.log("mindie-llm-request")


def test_a_streamed_beam_search_sends_whole_choices(server: Daemon) -> None:
    body = {**FULL, "use_beam_search": True, "n": 2}
    whole = server.post("/v1/completions", body).json()
    *frames, done = server.frames("/v1/completions", {**body, "stream": True})
    assert done == "[DONE]" and len(frames) == 1
    frame = json.loads(frames[0])
    assert frame["choices"] == whole["choices"] and frame["usage"]["completion_tokens"] == 48
    chat = {**CHAT, "use_beam_search": True, "n": 2, "stream": True, "max_tokens": 20}
    *frames, done = server.frames("/v1/chat/completions", chat)
    assert done == "[DONE]" and [json.loads(f)["choices"][0]["index"] for f in frames] == [0, 1]


def test_n_gives_different_choices_that_a_seed_repeats(server: Daemon) -> None:
    body = {**FULL, "n": 4, "temperature": 1.0, "seed": 3}
    first = server.post("/v1/completions", body).json()
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) == 4
    assert first["usage"]["completion_tokens"] == 96 == len(first["usage"]["batch_size"])
    assert [c["text"] for c in server.post("/v1/completions", body).json()["choices"]] == texts
    alone = server.post("/v1/completions", {**body, "n": 1}).json()["choices"][0]["text"]
    assert alone == texts[0]


def test_streamed_choices_interleave_and_end_once_each(server: Daemon) -> None:
    body = {**FULL, "n": 3, "temperature": 1.0, "seed": 3, "stream": True}
    whole = server.post("/v1/completions", {**body, "stream": False}).json()
    *payloads, done = server.frames("/v1/completions", body)
    frames = [json.loads(payload) for payload in payloads]
    assert done == "[DONE]"
    for index in range(3):
        own = [f for f in frames if f["choices"][0]["index"] == index]
        assert "".join(f["choices"][0]["text"] for f in own) == whole["choices"][index]["text"]
        assert [f["choices"][0]["finish_reason"] is not None for f in own] == [False] * 23 + [True]
        assert own[-1]["usage"]["completion_tokens"] == 24


def test_a_stop_string_ends_only_its_own_choice(server: Daemon) -> None:
    body = {**PLAIN, "n": 4, "temperature": 1.0, "seed": 3, "max_tokens": 60}
    texts = [c["text"] for c in server.post("/v1/completions", body).json()["choices"]]
    stop = texts[1][20:28]
    stopped = server.post("/v1/completions", {**body, "stop": stop}).json()["choices"]
    for text, choice in zip(texts, stopped, strict=True):
        assert choice["text"] == (text[: text.index(stop)] if stop in text else text)
        assert choice["finish_reason"] == ("stop" if stop in text else choice["finish_reason"])


def test_best_of_returns_the_most_likely(server: Daemon) -> None:
    body = {**FULL, "temperature": 1.0, "seed": 3, "logprobs": 0}
    every = server.post("/v1/completions", {**body, "n": 6}).json()["choices"]
    scores = {c["text"]: sum(c["logprobs"]["token_logprobs"]) for c in every}
    best = server.post("/v1/completions", {**body, "n": 2, "best_of": 6}).json()
    assert [c["text"] for c in best["choices"]] == sorted(scores, key=lambda text: -scores[text])[:2]
    assert best["usage"]["completion_tokens"] == 6 * 24


def test_logprobs_are_the_models_own(server: Daemon, reference: tuple[Any, Any]) -> None:
    """Under a temperature and penalties too: the distribution before all of them."""
    model, tokenizer = reference
    body = {
        **PLAIN,
        "logprobs": 3,
        "temperature": 0.7,
        "seed": 1,
        "repetition_penalty": 1.3,
        "ignore_eos": True,
    }
    logprobs = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 24
    context = tokenizer.encode(PROMPT)
    chosen = tokenizer.encode("".join(logprobs["tokens"]))
    if len(chosen) != 24:
        pytest.skip("the answer's text encodes to other tokens")
    with torch.inference_mode():
        wanted = model(torch.tensor([context + chosen])).logits[0].log_softmax(-1)
    for position, token in enumerate(chosen):
        row = wanted[len(context) - 1 + position]
        assert math.isclose(logprobs["token_logprobs"][position], float(row[token]), abs_tol=2e-3)
        best = sorted(logprobs["top_logprobs"][position].values(), reverse=True)[:3]
        assert torch.allclose(torch.tensor(best), row.topk(3).values, atol=2e-3)


def test_chat_logprobs_have_one_entry_per_token(server: Daemon) -> None:
    body = {**CHAT, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert len(whole) == 8
    for entry in whole:
        assert len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]  # greedy
    *payloads, _ = server.frames("/v1/chat/completions", {**body, "stream": True})
    streamed = [entry for p in payloads for entry in json.loads(p)["choices"][0]["logprobs"]["content"]]
    assert streamed == whole


def test_bias_min_tokens_and_min_p_reach_the_sampler(server: Daemon, reference: tuple[Any, Any]) -> None:
    _, tokenizer = reference
    greedy = server.post("/v1/completions", {**PLAIN, "max_tokens": 1, "logprobs": 1}).json()["choices"][0]
    first = tokenizer.encode(greedy["text"])[0]
    banned = server.post(
        "/v1/completions", {**PLAIN, "max_tokens": 1, "logit_bias": {str(first): -100}}
    ).json()
    assert banned["choices"][0]["text"] != greedy["text"]
    forced = server.post("/v1/completions", {**PLAIN, "max_tokens": 3, "logit_bias": {"300": 100}}).json()
    assert forced["choices"][0]["text"] == tokenizer.decode([300] * 3)
    only_best = {**PLAIN, "temperature": 5.0, "min_p": 1.0, "seed": 2}
    assert (
        server.post("/v1/completions", only_best).json()["choices"][0]["text"]
        == server.post("/v1/completions", PLAIN).json()["choices"][0]["text"]
    )
    chat = {**CHAT, "max_tokens": 200}
    short = server.post("/v1/chat/completions", chat).json()["usage"]["completion_tokens"]
    long = server.post("/v1/chat/completions", {**chat, "min_tokens": short + 20}).json()["usage"]
    assert long["completion_tokens"] >= short + 20
