"""Prefix cache, Mix and swapping on the running daemon: equal answers, hits told, nothing across keys."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.e2e.test_metrics import scrape
from tests.harness import TINY_MODEL, Daemon, Json, eventually, merge, model_config

BLOCK = 16
KEYS = ("key-of-alice", "key-of-bob")
# what many requests have in common, and each its own end
PREFIX = [id % 200 + 5 for id in range(0, 7 * 130, 7)]
PROMPTS = [[*PREFIX[: 130 - 40 * (number % 3)], 50 + number, 60 + number] for number in range(9)]
MakeDaemon = Callable[..., Daemon]


def configuration(plugin: str, blocks: int, **changes: Any) -> Json:
    limits: Json = {
        "BackendConfig": {
            "ModelDeployConfig": {"maxSeqLen": 256, "maxInputTokenLen": 200},
            "ScheduleConfig": {
                "cacheBlockSize": BLOCK,
                "maxPrefillTokens": 512,
                "maxIterTimes": 64,
                **changes,
            },
            "runtimeConfig": {
                "dtype": "float32",
                "kvCacheBlockNum": blocks,
                "maxWaitingTokens": 100_000,
                "apiKeys": [
                    {"name": f"k{number}", "sha256": hashlib.sha256(key.encode()).hexdigest()}
                    for number, key in enumerate(KEYS)
                ],
            },
        }
    }
    params = json.dumps({"plugin_type": plugin}) if plugin else ""
    return merge(
        limits,
        model_config(
            plugin_params=params, cpuMemSize=1, modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL)
        ),
    )


def complete(daemon: Daemon, prompt: list[int], key: str = KEYS[0], **members: Any) -> tuple[Json, str]:
    """The answer, and its Server-Timing header."""
    body = {"model": "mindie-tiny", "prompt": prompt, "max_tokens": 33, "temperature": 0, **members}
    connection: http.client.HTTPConnection = daemon.connect()
    try:
        headers = {"Authorization": f"Bearer {key}", "X-MindIE-Timings": "1"}
        connection.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
        response = connection.getresponse()
        raw = response.read()
        assert response.status == 200, raw
        return json.loads(raw), response.headers["Server-Timing"]
    finally:
        connection.close()


def cached(answer: Json) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def everything(daemon: Daemon) -> tuple[list[list[str]], int]:
    """All prompts at once, twice, some with two choices: the texts, and how many tokens were in the cache."""

    def one(number: int) -> Json:
        several = {"n": 2, "temperature": 1, "seed": number} if number % 4 == 3 else {}
        return complete(daemon, PROMPTS[number % len(PROMPTS)], **several)[0]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(one, [*range(len(PROMPTS)), *range(len(PROMPTS))]))
    texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    return texts, sum(map(cached, answers))


def test_answers_are_those_of_neither_and_hits_are_told(make_daemon: MakeDaemon) -> None:
    plain = make_daemon(configuration("", 400)).start().wait_ready()
    want, hits = everything(plain)
    assert hits == 0
    plain.stop()
    # pieces of 64 tokens at most are less than a prompt
    mix = {
        "templateType": "Mix", "maxPrefillTokens": 64, "maxBatchSize": 24, "maxPrefillBatchSize": 0,
        "maxPreemptCount": 4,
    }  # fmt: skip
    mixed = make_daemon(configuration("splitfuse", 20, **mix)).start().wait_ready()
    assert everything(mixed) == (want, 0)
    eventually(lambda: "swapped out" in mixed.log("mindie-llm-request"), 5, "a line of the request log")
    mixed.stop()
    # two prompts fill it: they preempt each other, and what is kept is evicted
    daemon = make_daemon(configuration("prefix_cache", 20)).start().wait_ready()
    got, hits = everything(daemon)
    assert got == want and hits > 0
    eventually(lambda: "preempted" in daemon.log("mindie-llm-request"), 5, "a line of the request log")

    own = [*range(300, 300 + 3 * BLOCK), 7]
    answers = [complete(daemon, own, key) for key in (KEYS[0], KEYS[1], KEYS[0])]
    assert [cached(answer) for answer, _ in answers] == [0, 0, 3 * BLOCK]
    assert f'cached_tokens;desc="{3 * BLOCK}"' in answers[2][1]
    line = rf"prompt_tokens={len(own)} .*cached_tokens={3 * BLOCK} "
    eventually(lambda: re.search(line, daemon.log("mindie-llm-request")), 5, "its line in the request log")

    seeded = {"seed": 3, "temperature": 1, "logprobs": 2}
    fresh, again = (complete(daemon, own, **seeded)[0] for _ in range(2))
    assert (cached(fresh), cached(again)) == (0, 3 * BLOCK)
    assert fresh["choices"] == again["choices"], "to the last bit of its log-probabilities"

    pair = complete(daemon, [own, own], n=2, seed=3, temperature=1)[0]  # type: ignore[arg-type]
    assert cached(pair) == 2 * 3 * BLOCK
    eventually(lambda: scrape(daemon, KEYS[0])["all_radix_match_num"] > 0, 5, "a look at the cache")
    found = scrape(daemon, KEYS[0])
    assert 0 < found["npu_radix_match_hit_num"] < found["all_radix_match_num"]
    assert (
        found["npu_prefix_cache_hit_rate"] == found["npu_radix_match_hit_num"] / found["all_radix_match_num"]
    )
    assert found["npu_cache_usage_perc"] == 0, "what is kept for others counts as free"


def test_two_instances_keep_together_what_begins_alike(make_daemon: MakeDaemon) -> None:
    """Even where one of them answers somebody and the other one idles, if the beginning is worth it."""
    two: Json = {
        "modelInstanceNumber": 2,
        "npuDeviceIds": [[0], [1]],
        "ModelDeployConfig": {"maxSeqLen": 1024, "maxInputTokenLen": 800},
        "ScheduleConfig": {"maxPrefillTokens": 1024, "maxIterTimes": 200},
    }
    daemon = (
        make_daemon(merge(configuration("prefix_cache", 200), {"BackendConfig": two})).start().wait_ready()
    )
    beginnings = [[(start + 7 * id) % 200 + 5 for id in range(40 * BLOCK)] for start in (0, 100)]

    def ask(text: int, end: int) -> int:
        return cached(complete(daemon, [*beginnings[text], end], max_tokens=1)[0])

    assert [ask(0, 50), ask(1, 51)] == [0, 0]
    endless = {
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "model": "mindie-tiny",
        "temperature": 0,
    }
    connection = daemon.connect()
    body = json.dumps({**endless, "prompt": [*beginnings[0], 52]}).encode()
    connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEYS[0]}"})
    stream = connection.getresponse()
    assert stream.readline().startswith(b"data:")  # it decodes now, and nobody reads further
    assert [ask(0, 53), ask(1, 54), ask(0, 55)] == [40 * BLOCK] * 3
    stream.read()
    connection.close()
    assert daemon.stop() == 0
