"""The loop that plans while another thread computes: tokens, ends, adapters, endpoints that go, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from engine.core import EngineCore
from engine.executor import Sampled
from engine.outcome import FinishCode
from engine.overlap import OverlappedCore
from engine.plan import StepPlan
from engine.wire import messages as m
from tests.engine.fake_model import FakeModel
from tests.engine.test_adapters import Bench, Executor, Store


class Slow(Executor):
    """Computes for long enough to be met in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FakeModel(64, 4)
        self.threads: set[int] = set()  # that have computed
        self.fails_at = -1  # which step, counted from 0

    def run(self, plan: StepPlan) -> Sampled:
        if len(self.rows) == self.fails_at:
            raise MemoryError("no room for the step")
        super().run(plan)
        self.threads.add(threading.get_ident())
        time.sleep(0.003)
        return self.model.run(plan)


class Careful(Store):
    """Puts adapters in force and takes them away: never while a step may use them."""

    core: OverlappedCore

    def take_loaded(self) -> list[tuple[str, str]]:
        assert not self.ready or not self.core._lookahead.in_flight
        return super().take_loaded()

    def remove(self, name: str) -> None:
        assert not self.core._lookahead.in_flight
        super().remove(name)


@pytest.fixture
def bench() -> Iterator[Bench]:
    store = Careful()
    bench = Bench(store, Slow(), OverlappedCore)
    assert isinstance(bench.core, OverlappedCore)
    store.core = bench.core
    yield bench
    bench.close()


def tokens_of(bench: Bench, num_requests: int) -> dict[int, list[int]]:
    """Every request to its end."""
    told: dict[int, list[int]] = {}
    ended: set[int] = set()
    for _ in range(100):
        bench.core.step()
        for row in bench.rows():
            assert row.request_id not in ended
            told.setdefault(row.request_id, []).append(row.token)
            if row.finish != FinishCode.NONE:
                ended.add(row.request_id)
        if len(ended) == num_requests:
            break
    return told


def test_tokens_are_those_of_the_plain_loop(bench: Bench) -> None:
    plain = Bench(None, Slow(), EngineCore)
    lengths = {1: 3, 2: 9, 3: 1, 4: 6}
    for request_id, length in lengths.items():
        for each in (plain, bench):
            each.submit(request_id, max_tokens=length)
    assert tokens_of(bench, 4) == tokens_of(plain, 4)
    assert isinstance(bench.executor, Slow) and len(bench.executor.threads) == 1
    assert threading.get_ident() not in bench.executor.threads
    plain.close()


def test_requests_that_come_and_go_while_a_step_is_computed(bench: Bench) -> None:
    bench.submit(1, max_tokens=25)
    for _ in range(3):
        bench.core.step()
    bench.submit(2, max_tokens=4)
    bench.commands.send(m.Abort(1, -1))
    told = tokens_of(bench, 1)
    assert len(told[2]) == 4 and len(told[1]) == 3, "nothing of the first after its end"
    assert bench.core.scheduler.blocks.num_free == 64


@pytest.mark.parametrize("used", [True, False])
def test_adapters_come_and_go_between_steps(bench: Bench, used: bool) -> None:
    """`used`: by a request, to whose end one that is to go stays."""
    assert isinstance(bench.store, Careful) and isinstance(bench.core, OverlappedCore)
    bench.submit(1, "fixed" if used else "", max_tokens=4)
    bench.submit(2, max_tokens=25)
    bench.core.step()
    bench.commands.send(m.LoraLoad("guest", "/dir"))
    bench.commands.send(m.LoraUnload("fixed"))
    bench.core.step()
    bench.store.ready = [("guest", "")]
    for _ in range(5):
        bench.core.step()
    assert bench.done() == [m.LoraDone("guest", ""), m.LoraDone("fixed", "")]
    assert bench.store.here == {"guest"} and bench.core.scheduler.running
    assert bench.core._lookahead.in_flight == 1, "and steps overlap again"


def test_an_endpoint_that_goes_takes_its_requests_along(bench: Bench) -> None:
    assert isinstance(bench.core, OverlappedCore)
    bench.submit(1, max_tokens=25)
    bench.core.step()
    assert len(bench.rows()) == 1 and bench.core._lookahead.in_flight == 1
    bench.control.send(m.EndpointDown())
    bench.core.step()
    assert bench.control.receive() == [m.Quiet(0, 0)] and not bench.rows()
    assert not bench.core.scheduler.has_work and bench.core.scheduler.blocks.num_free == 64
    assert not bench.core._lookahead.in_flight


def test_a_step_that_fails_ends_the_loop(bench: Bench) -> None:
    assert isinstance(bench.executor, Slow)
    bench.executor.fails_at = 3
    bench.submit(1, max_tokens=25)
    with pytest.raises(MemoryError, match="no room"):
        tokens_of(bench, 1)
    assert len(bench.executor.rows) == 3


def test_the_thread_is_prepared_before_its_first_step() -> None:
    prepared: list[int] = []
    executor = Slow()
    core_class = partial(OverlappedCore, set_up_thread=lambda: prepared.append(threading.get_ident()))
    bench = Bench(None, executor, core_class)
    bench.submit(1, max_tokens=2)
    tokens_of(bench, 1)
    assert set(prepared) == executor.threads and len(prepared) == 1
    bench.close()


def test_a_step_is_planned_while_another_one_is_computed(bench: Bench) -> None:
    """Its arrays are there before the result that it continues."""
    assert isinstance(bench.core, OverlappedCore)
    bench.submit(1, max_tokens=25)
    bench.core.step()
    assert bench.core._lookahead.in_flight == 1
    bench.core._fill()
    assert bench.core._lookahead.in_flight == 2
    (seq,) = bench.core.scheduler.running[0].sequences
    assert len(bench.rows()) == 1 and seq.num_tokens == 3 + 2
