"""Adapters between steps: when they come into force, when they go, and who is refused meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest

from engine.adapters import AdapterDesk
from engine.block_manager import BlockManager
from engine.core import EngineCore, Watched
from engine.endpoint_link import EndpointLink, LinkEnds
from engine.errors import InvalidRequest
from engine.executor import Sampled
from engine.outcome import FinishCode
from engine.plan import StepPlan
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.settings import ScheduleSettings
from engine.wire import layout, sizes
from engine.wire import messages as m
from engine.wire.channel import Channel
from engine.wire.ring import RingReader, RingWriter, create_ring
from engine.wire.vitals import Vitals

LIMITS = ScheduleSettings(
    block_size=4,
    max_prefill_batch_size=8,
    max_prefill_tokens=64,
    max_batch_size=8,
    max_iter_times=64,
    max_queue_delay_us=0,
    max_first_token_wait_ms=0,
    max_n=4,
    max_seq_len=32,
    max_input_len=31,
    truncation="off",
)


class Store:
    """Loads when the test says so."""

    def __init__(self) -> None:
        self.here = {"fixed"}
        self.asked: list[tuple[str, str]] = []
        self.ready: list[tuple[str, str]] = []
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def __contains__(self, name: object) -> bool:
        return name in self.here

    def load(self, name: str, path: str) -> None:
        self.asked.append((name, path))

    def take_loaded(self) -> list[tuple[str, str]]:
        done, self.ready = self.ready, []
        self.here |= {name for name, error in done if not error}
        return done

    def remove(self, name: str) -> None:
        self.here.discard(name)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class Executor:
    """Samples token 7 for ever, and notes which adapters its rows had."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def run(self, plan: StepPlan) -> Sampled:
        self.rows.append([seq.params.lora for seq in plan.sequences])
        return Sampled(np.full(len(plan.samples), 7, np.int32))


class Pipe:
    """A channel that delivers at once, and never lets its reader sleep."""

    def __init__(self) -> None:
        self.messages: list[m.Message] = []
        self._fd = os.eventfd(1, os.EFD_NONBLOCK)

    def send(self, message: m.Message) -> bool:
        self.messages.append(message)
        return True

    def receive(self) -> list[m.Message]:
        received, self.messages = self.messages, []
        return received

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Once more is fine: a link that was closed has closed its ends."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Bench:
    """A core with the endpoint's ends of its channels."""

    def __init__(
        self,
        store: Store | None,
        executor: Executor | None = None,
        core_class: Callable[..., EngineCore] = EngineCore,
    ) -> None:
        self.commands, self.events, self.control = Pipe(), Pipe(), Pipe()
        prompts = create_ring("t_prompt", 8, sizes.prompt_slot_bytes(16))
        tokens = create_ring("t_token", 8, sizes.TOKEN_SLOT_BYTES)
        ends = LinkEnds(
            commands=cast(Channel, self.commands),
            events=cast(Channel, self.events),
            prompts=RingReader(prompts),
            tokens=RingWriter(tokens),
        )
        link = EndpointLink(lambda generation: ends, lambda: m.EngineReady(0, 9, 9, 9, 9, "cpu", ""))
        link.open(0)
        self.events.receive()
        watched = Watched(cast(Channel, self.control), Vitals(1).pulse(0), 60.0)
        self.prompts, self.tokens = RingWriter(prompts), RingReader(tokens)
        self.store, self.executor = store, executor or Executor()
        self.core = core_class(
            0, Scheduler(LIMITS, BlockManager(64, 4), ()), self.executor, link, watched, adapters=store
        )

    def submit(self, request_id: int, lora: str = "", max_tokens: int = 3, branches: int = 1) -> None:
        slot = self.prompts.reserve()
        assert slot is not None
        layout.write_prompt(slot, request_id, np.array([1, 2, 3], np.int32))
        self.prompts.commit()
        params = SamplingParams(max_tokens=max_tokens, lora=lora, branches=branches)
        self.commands.send(m.Submit(request_id, 3, 5, (), b"", params))

    def close(self) -> None:
        for pipe in (self.commands, self.events, self.control):
            pipe.close()
        if self.store is not None:
            self.store.close()

    def done(self) -> list[m.LoraDone]:
        return [message for message in self.events.receive() if isinstance(message, m.LoraDone)]

    def rows(self) -> list[layout.TokenRow]:
        found: list[layout.TokenRow] = []
        while (slot := self.tokens.take()) is not None:
            found += layout.read_tokens(slot)[1]
            self.tokens.release()
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(Store())
    yield bench
    bench.close()


def test_loading_is_answered_when_it_has_ended(bench: Bench) -> None:
    assert bench.store is not None
    bench.commands.send(m.LoraLoad("guest", "/dir"))
    bench.core.step()
    assert bench.store.asked == [("guest", "/dir")] and not bench.core.desk.serves("guest")
    bench.store.ready = [("guest", ""), ("other", "no such file")]
    bench.core.step()
    assert bench.done() == [m.LoraDone("guest", ""), m.LoraDone("other", "no such file")]
    assert bench.core.desk.serves("guest") and not bench.core.desk.serves("other")


def test_steps_go_on_while_an_adapter_is_read(bench: Bench) -> None:
    bench.submit(1, "fixed")
    bench.commands.send(m.LoraLoad("guest", "/dir"))
    for _ in range(5):
        bench.core.step()
    assert [row.finish for row in bench.rows()][-1] == FinishCode.LENGTH
    assert bench.executor.rows == [["fixed"]] * 3


def test_unloading_waits_for_the_requests_that_use_it_and_refuses_new_ones(bench: Bench) -> None:
    assert bench.store is not None
    bench.submit(1, "fixed", max_tokens=4)
    bench.submit(2, "", max_tokens=8)
    bench.core.step()
    bench.commands.send(m.LoraUnload("fixed"))
    bench.submit(3, "fixed", branches=2)
    bench.core.step()
    refused = [(row.request_id, row.branch, row.finish, row.error) for row in bench.rows() if row.error]
    assert refused == [(3, branch, FinishCode.ERROR, InvalidRequest.number) for branch in (0, 1)]
    while any(group.params.lora for group in bench.core.scheduler.running):
        assert "fixed" in bench.store
        bench.core.step()
    bench.core.step()
    assert "fixed" not in bench.store and bench.core.scheduler.running
    assert bench.done() == [m.LoraDone("fixed", "")]


def test_an_abort_frees_an_adapter_as_an_end_does(bench: Bench) -> None:
    assert bench.store is not None
    bench.submit(1, "fixed", max_tokens=20)
    bench.core.step()
    bench.commands.send(m.LoraUnload("fixed"))
    bench.core.step()
    assert "fixed" in bench.store
    bench.commands.send(m.Abort(1, -1))
    bench.core.step()
    assert "fixed" not in bench.store and bench.done() == [m.LoraDone("fixed", "")]


def test_unloading_what_is_not_there_is_done_at_once(bench: Bench) -> None:
    bench.commands.send(m.LoraUnload("stranger"))
    bench.core.step()
    assert bench.done() == [m.LoraDone("stranger", "")]


def test_without_weights_every_adapter_is_refused() -> None:
    bench = Bench(None)
    desk: AdapterDesk = bench.core.desk
    assert desk.serves("") and not desk.serves("fixed") and desk.filenos() == []
    bench.commands.send(m.LoraLoad("guest", "/dir"))
    bench.core.step()
    (answer,) = bench.done()
    assert answer.name == "guest" and "StandardMock" in answer.error
    bench.close()
