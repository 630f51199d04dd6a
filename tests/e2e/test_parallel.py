"""A model divided among several ranks by the real daemon: the same answers, and deaths are healed for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts.write_random_model import Experts, Shape, write_model
from tests.harness import (
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
# experts so wide that a long prompt takes more memory than an allocator has at hand
SHAPE = Shape("qwen3_moe", 2, 64, 4, 2, 64, 2048, tied=False, head_size=16, experts=Experts(4, 2, 8192))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "wide"
    write_model(SHAPE, folder)
    return folder


def divided(model: Path, size: int, **changes: object) -> Json:
    """A configuration of one instance with so many ranks. In float32 sums in another order decide nothing."""
    of_model = model_config(modelName="mindie-tiny", modelWeightPath=str(model), worldSize=size, **changes)
    backend = {
        "npuDeviceIds": [list(range(size))],
        "runtimeConfig": {"dtype": "float32", "stepTimeoutSec": 5, "kvCacheBlockNum": 128},
    }
    return merge(merge(LONG_CONFIG, of_model), {"BackendConfig": backend})


def answers(daemon: Daemon) -> list[object]:
    """Greedy and seeded texts."""
    found: list[object] = []
    for prompt in PROMPTS:
        for sampling in ({"temperature": 0}, {"temperature": 0.8, "seed": 4, "n": 2}):
            body = {"model": "mindie-tiny", "prompt": prompt, "max_tokens": 30, **sampling}
            answer = daemon.post("/v1/completions", body)
            assert answer.status == 200, answer.body
            found.append([choice["text"] for choice in answer.json()["choices"]])
    return found


@pytest.fixture(scope="module")
def whole(installation: Installation, model: Path) -> Iterator[list[object]]:
    daemon = installation.daemon(divided(model, 1)).start().wait_ready()
    yield answers(daemon)
    assert daemon.stop() == 0


def ranks(daemon: Daemon) -> list[str]:
    """The log's lines of workers that were started."""
    return [line for line in daemon.stderr.splitlines() if "role=worker" in line and " started" in line]


@pytest.fixture(scope="module")
def pair(installation: Installation, model: Path) -> Iterator[Daemon]:
    """A daemon of two ranks with half of the experts each, which every test leaves serving."""
    daemon = installation.daemon(divided(model, 2, moe_ep=2)).start().wait_ready(180)
    yield daemon
    assert daemon.stop() == 0
    assert not daemon.leftovers()


def deaths(daemon: Daemon) -> int:
    return daemon.stderr.count(" died: ")


@contextmanager
def healed(daemon: Daemon) -> Iterator[None]:
    """What is done meanwhile ends one rank; the other ends with it, and both begin anew."""
    started, died, served = len(ranks(daemon)), deaths(daemon), daemon.stderr.count("serves again")
    yield
    eventually(lambda: daemon.stderr.count("serves again") > served, 60.0, "healed")
    assert len(ranks(daemon)) == started + 2
    assert deaths(daemon) == died + 1


def test_two_ranks_answer_as_one(pair: Daemon, whole: list[object]) -> None:
    assert answers(pair) == whole
    workers = [child for child in pair.children() if child.pid != pair.child("endpoint").pid]
    assert len(workers) == 2 and {child.ppid() for child in workers} == {pair.pid}


def test_a_rank_that_dies_is_healed_with_the_other(pair: Daemon, whole: list[object]) -> None:
    body = {**LONG, "max_tokens": 300, "temperature": 0}
    undisturbed = pair.frames("/v1/completions", body)
    with healed(pair):
        stream = Stream(pair, body)
        assert stream.started.wait(60)
        pair.child("worker instance=0 rank=1").kill()
        stream.join(100)
    assert text_of(sse_payloads(stream.received)) == text_of(undisturbed)
    assert answers(pair) == whole


def test_a_step_without_memory_costs_no_request(pair: Daemon) -> None:
    """The kernel refuses one rank more address space: requests of that step and those beside it go on."""
    running = {**LONG, "max_tokens": 300, "temperature": 0}
    long = {**LONG, "prompt": "A dog and a cat. " * 100, "max_tokens": 20, "temperature": 0}
    with healed(pair):
        stream = Stream(pair, running)
        assert stream.started.wait(60)
        worker = pair.child("worker instance=0 rank=1")
        taken = worker.memory_info().vms
        worker.rlimit(psutil.RLIMIT_AS, (taken, taken))
        late = pair.frames("/v1/completions", long)
        stream.join(100)
    assert "can't allocate memory" in pair.stderr
    for body, told in ((running, sse_payloads(stream.received)), (long, late)):
        assert text_of(told) == text_of(pair.frames("/v1/completions", body))


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_healed(pair: Daemon) -> None:
    body = {**LONG, "max_tokens": 200, "temperature": 0}
    undisturbed = pair.frames("/v1/completions", body)
    with healed(pair):
        stream = Stream(pair, body)
        assert stream.started.wait(60)
        pair.child("worker instance=0 rank=1").suspend()
        stream.join(100)
    assert text_of(sse_payloads(stream.received)) == text_of(undisturbed)


def test_four_ranks_answer_as_one(make_daemon: MakeDaemon, model: Path, whole: list[object]) -> None:
    """More ranks than heads of keys and values: two hold each. Experts: two hold a half of each of two."""
    daemon = make_daemon(divided(model, 4, moe_tp=2)).start().wait_ready(180)
    assert answers(daemon) == whole
    assert daemon.stop() == 0


def test_a_model_that_does_not_divide_is_refused_in_one_line(make_daemon: MakeDaemon, model: Path) -> None:
    daemon = make_daemon(divided(model, 3)).start()
    assert daemon.wait(60) != 0
    (cause,) = [line for line in daemon.stderr.splitlines() if "start failed" in line]
    assert "worldSize=3" in cause and "num_attention_heads 4, no multiple of 3" in cause
    assert cause.endswith("allowed: 1, 2, 4")


def text_of(payloads: list[str]) -> str:
    assert payloads[-1] == "[DONE]"
    frames = [json.loads(payload) for payload in payloads[:-1]]
    return "".join(frame["choices"][0]["text"] for frame in frames if frame["choices"])
