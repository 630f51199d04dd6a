"""Greedy output of the running server against transformers, token for token, on the shipped model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.harness import TINY_MODEL, Daemon, Json, sse_payloads

NUM_PROMPTS = 100
MAX_PROMPT = 600
MAX_NEW = 16
MakeDaemon = Callable[..., Daemon]


def config(dtype: str, **runtime: int) -> Json:
    return {
        "BackendConfig": {
            "ModelDeployConfig": {"maxSeqLen": 640, "maxInputTokenLen": MAX_PROMPT},
            "ScheduleConfig": {"cacheBlockSize": 16, "maxPrefillTokens": 2048, "maxIterTimes": 40},
            "runtimeConfig": {"dtype": dtype, **runtime},
        }
    }


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """100 prompts of 1 to 600 tokens cut out of the held-out problems, none like another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    lines = (TINY_MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rng = random.Random(0)
    made = []
    for number in range(NUM_PROMPTS):
        length = 1 + number * (MAX_PROMPT - 1) // (NUM_PROMPTS - 1)
        ids: list[int] = []
        while len(ids) < length:
            problem: dict[str, str] = json.loads(rng.choice(lines))
            ids += tokenizer.encode(f"Question: {problem['question']}\nAnswer: {problem['answer']}\n\n")
        made.append(ids[-length:])
    return made


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    return {"float32": reference(prompts, torch.float32), "bfloat16": reference(prompts, torch.bfloat16)}


def reference(prompts: list[list[int]], dtype: torch.dtype) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # small products: a second thread only waits when others use the machine
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=dtype).eval()
    outputs = []
    for ids in prompts:
        with torch.inference_mode():
            whole: Any = model.generate(torch.tensor([ids]), max_new_tokens=MAX_NEW, do_sample=False)
        outputs.append(whole[0, len(ids) :].tolist())
    return outputs


def generate(daemon: Daemon, ids: list[int], max_new: int = MAX_NEW) -> list[int]:
    body = {"input_id": ids, "stream": True, "parameters": {"max_new_tokens": max_new, "do_sample": False}}
    with daemon.streaming("/infer_token", body) as response:
        raw = response.read()
        assert response.status == 200, raw
    return [token for payload in sse_payloads(raw) for token in json.loads(payload)["token"]["id"]]


def all_at_once(daemon: Daemon, prompts: list[list[int]], max_new: int = MAX_NEW) -> list[list[int]]:
    with ThreadPoolExecutor(NUM_PROMPTS) as pool:
        return list(pool.map(lambda ids: generate(daemon, ids, max_new), prompts))


def test_fp32_alone_and_all_at_once(
    make_daemon: MakeDaemon, prompts: list[list[int]], expected: dict[str, list[list[int]]]
) -> None:
    daemon = make_daemon(config("float32")).start().wait_ready()
    assert [generate(daemon, ids) for ids in prompts] == expected["float32"]
    assert all_at_once(daemon, prompts) == expected["float32"]


def test_F17_fp32_with_a_pool_so_small_that_sequences_are_preempted(
    make_daemon: MakeDaemon, prompts: list[list[int]], expected: dict[str, list[list[int]]]
) -> None:
    waiting = NUM_PROMPTS * MAX_PROMPT  # far more than four times this cache
    daemon = make_daemon(config("float32", kvCacheBlockNum=64, maxWaitingTokens=waiting)).start().wait_ready()
    assert all_at_once(daemon, prompts) == expected["float32"]
    assert "preempted" in daemon.log("mindie-llm-request")


def test_bf16_agrees_nearly_everywhere(
    make_daemon: MakeDaemon, prompts: list[list[int]], expected: dict[str, list[list[int]]]
) -> None:
    """bf16 rounds differently in every kernel, so near ties fall either way.

    Asked for one token after the same context (prompt + part of transformers' answer), the share of equal
    tokens is reported and bounded; whole answers part for good at their first near tie.
    """
    daemon = make_daemon(config("bfloat16")).start().wait_ready()
    contexts, wanted = [], []
    for ids, answer in zip(prompts, expected["bfloat16"], strict=True):
        for cut in range(0, min(len(answer), MAX_PROMPT - len(ids) + 1), 6):
            contexts.append(ids + answer[:cut])
            wanted.append(answer[cut])
    got = [tokens[0] for tokens in all_at_once(daemon, contexts, max_new=1)]
    share = sum(a == b for a, b in zip(got, wanted, strict=True)) / len(wanted)
    print(f"bf16: {share:.1%} of {len(wanted)} next tokens equal")
    assert share > 0.9
