"""A model divided among several ranks by the real daemon: the same answers, and deaths are healed for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

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
from tests.streams import LONG, LONG_CONFIG, Stream

pytestmark = pytest.mark.timeout(300)  # several processes load torch, on machines with two cores

MakeDaemon = Callable[..., Daemon]
PROMPTS = ("A dog and a cat", "Two birds", "The sum of 3 and 4 is")


def divided(size: int, **changes: object) -> Json:
    """A configuration of one instance with so many ranks. In float32 sums in another order decide nothing."""
    model = model_config(modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL), worldSize=size, **changes)
    backend = {
        "npuDeviceIds": [list(range(size))],
        "runtimeConfig": {"dtype": "float32", "stepTimeoutSec": 5},
    }
    return merge(merge(LONG_CONFIG, model), {"BackendConfig": backend})


def answers(daemon: Daemon) -> list[object]:
    """Greedy and seeded texts, with log-probabilities of the prompt to which every rank contributes."""
    found: list[object] = []
    for prompt in PROMPTS:
        for sampling in ({"temperature": 0}, {"temperature": 0.8, "seed": 4, "n": 2}):
            body = {"model": "mindie-tiny", "prompt": prompt, "max_tokens": 30, **sampling}
            answer = daemon.post("/v1/completions", body)
            assert answer.status == 200, answer.body
            found.append([choice["text"] for choice in answer.json()["choices"]])
    return found


@pytest.fixture(scope="module")
def whole(installation: Installation) -> Iterator[list[object]]:
    daemon = installation.daemon(divided(1)).start().wait_ready()
    yield answers(daemon)
    assert daemon.stop() == 0


def ranks(daemon: Daemon) -> list[str]:
    """The log's lines of workers that were started."""
    return [line for line in daemon.stderr.splitlines() if "role=worker" in line and " started" in line]


def test_two_ranks_answer_as_one_and_heal_together(make_daemon: MakeDaemon, whole: list[object]) -> None:
    daemon = make_daemon(divided(2)).start().wait_ready(180)
    assert answers(daemon) == whole
    workers = [child for child in daemon.children() if child.pid != daemon.child("endpoint").pid]
    assert len(workers) == 2 and {child.ppid() for child in workers} == {daemon.pid}

    body = {**LONG, "max_tokens": 300, "temperature": 0}
    undisturbed = daemon.frames("/v1/completions", body)
    stream = Stream(daemon, body)
    assert stream.started.wait(60)
    daemon.child("worker instance=0 rank=1").kill()
    stream.join(100)
    assert text_of(sse_payloads(stream.received)) == text_of(undisturbed)
    eventually(lambda: "serves again" in daemon.stderr, 60.0, "healed")
    assert len(ranks(daemon)) == 4  # both were begun anew
    assert daemon.stderr.count(" died: ") == 1
    assert answers(daemon) == whole
    assert daemon.stop() == 0
    assert not daemon.leftovers()


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_healed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(divided(2)).start().wait_ready(180)
    body = {**LONG, "max_tokens": 200, "temperature": 0}
    undisturbed = daemon.frames("/v1/completions", body)
    stream = Stream(daemon, body)
    assert stream.started.wait(60)
    daemon.child("worker instance=0 rank=1").suspend()
    stream.join(100)
    assert text_of(sse_payloads(stream.received)) == text_of(undisturbed)
    assert daemon.stop() == 0


def test_four_ranks_answer_as_one(make_daemon: MakeDaemon, whole: list[object]) -> None:
    """More ranks than heads of keys and values: two hold each."""
    daemon = make_daemon(divided(4)).start().wait_ready(180)
    assert answers(daemon) == whole
    assert daemon.stop() == 0


def test_a_model_that_does_not_divide_is_refused_in_one_line(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(divided(3)).start()
    assert daemon.wait(60) != 0
    (cause,) = [line for line in daemon.stderr.splitlines() if "start failed" in line]
    assert "worldSize=3" in cause and "num_attention_heads 4, no multiple of 3" in cause
    assert cause.endswith("allowed: 1, 2, 4")


def text_of(payloads: list[str]) -> str:
    assert payloads[-1] == "[DONE]"
    frames = [json.loads(payload) for payload in payloads[:-1]]
    return "".join(frame["choices"][0]["text"] for frame in frames if frame["choices"])
