"""The step loop of an engine instance: receive, schedule, run, commit, publish."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NoReturn

from engine.adapters import AdapterDesk, AdapterStore
from engine.errors import EngineBug, InvalidRequest
from engine.executor import Executor
from engine.outcome import FinishCode, Outcome
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from engine.wire import layout
from engine.wire.channel import Channel
from engine.wire.messages import Abort, EngineStats, LoraLoad, LoraUnload, Submit
from engine.wire.ring import RingReader, RingWriter

log = logging.getLogger("llm.core")

_STATS_EVERY_S = 1.0


@dataclass(slots=True)
class StepTimes:
    """Where the time of all steps went, in seconds; scripts/profile_step.py prints it."""

    steps: int = 0
    receive: float = 0.0
    schedule: float = 0.0  # choosing the batch and laying out its arrays
    run: float = 0.0  # forward and sampling, split further by the executor
    commit: float = 0.0
    publish: float = 0.0


@dataclass(slots=True)
class EngineLinks:
    """An instance's ends of its channels to the endpoint."""

    instance: int
    commands: Channel  # Submit, Abort, LoraLoad, LoraUnload
    events: Channel  # EngineReady, EngineStats, LoraDone
    prompts: RingReader
    tokens: RingWriter


@dataclass(slots=True)
class EngineCore:
    """Drives one scheduler and one executor until the process ends.

    A failure in a step is not caught here: ranks may be out of step then, and a process in an unknown state
    is worse than a dead one.
    """

    scheduler: Scheduler
    executor: Executor
    links: EngineLinks
    adapters: AdapterStore | None = None  # None: there are no weights that could be adapted
    times: StepTimes = field(default_factory=StepTimes)
    desk: AdapterDesk = field(init=False)
    _stats_sent: float = 0.0
    _was_busy: bool = False

    def __post_init__(self) -> None:
        self.desk = AdapterDesk(self.adapters, self.scheduler, self.links.events)

    def run(self) -> NoReturn:
        while True:
            self.step()

    def step(self) -> None:
        """One turn of the loop: at most one engine step, or a wait for something to do."""
        clock, times = time.perf_counter, self.times
        start = clock()
        self._receive()
        self.desk.settle()
        received = clock()
        plan = self.scheduler.schedule(time.monotonic())
        refused = self.scheduler.take_refused()
        if refused:
            self._publish(refused, batch_size=0, step_us=0)
        if plan is None:
            self._wait()
            return
        scheduled = clock()
        sampled = self.executor.run(plan)
        computed = clock()
        outcomes = self.scheduler.commit(plan, sampled, time.monotonic())
        committed = clock()
        self._publish(outcomes, plan.num_rows, int((computed - scheduled) * 1e6))
        published = clock()
        times.steps += 1
        times.receive += received - start
        times.schedule += scheduled - received
        times.run += computed - scheduled
        times.commit += committed - computed
        times.publish += published - committed
        self._send_stats()

    # -- in -----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        for message in self.links.commands.receive():
            if isinstance(message, Submit):
                self._admit(message)
            elif isinstance(message, Abort):
                self.scheduler.abort(message.request_id, None if message.branch < 0 else message.branch)
            elif isinstance(message, LoraLoad | LoraUnload):
                self.desk.receive(message)
            else:
                log.warning("unexpected %s on the command channel", type(message).__name__)

    def _admit(self, submit: Submit) -> None:
        slot = self.links.prompts.take()
        if slot is None:
            raise EngineBug(f"request {submit.request_id} has no prompt on the ring")
        request_id, ids = layout.read_prompt(slot)
        self.links.prompts.release()
        if request_id != submit.request_id or len(ids) != submit.num_prompt_tokens:
            raise EngineBug(f"request {submit.request_id}: the ring holds the prompt of {request_id}")
        if not self.desk.serves(submit.sampling.lora):  # unloaded while the request was on its way here
            rows = range(submit.sampling.branches)
            refused = [Outcome(request_id, row, -1, FinishCode.ERROR, InvalidRequest, 0) for row in rows]
            self._publish(refused, batch_size=0, step_us=0)
            return
        self.scheduler.add(
            SequenceGroup(request_id, ids, submit.sampling, priority=submit.priority, now=time.monotonic())
        )

    def _wait(self) -> None:
        """Sleep until a message comes or the head of the waiting queue becomes due."""
        self._send_stats(idle=not self.scheduler.has_work)
        timeout = self.scheduler.seconds_until_due(time.monotonic())
        select.select([self.links.commands.fileno(), *self.desk.filenos()], [], [], timeout)

    # -- out ----------------------------------------------------------------------------------------

    def _publish(self, outcomes: Seq[Outcome], batch_size: int, step_us: int) -> None:
        for piece in layout.token_records(outcomes):
            while (slot := self.links.tokens.reserve()) is None:
                # The endpoint is behind by the whole ring: computing more would only grow the backlog.
                if not self.links.tokens.wait_free(1.0):
                    log.warning("the endpoint has not read tokens for a second; waiting")
            layout.write_tokens(slot, self.times.steps, batch_size, step_us, piece)
            self.links.tokens.commit()

    def _send_stats(self, *, idle: bool = False) -> None:
        now = time.monotonic()
        if idle and not self._was_busy:
            return
        if not idle and now - self._stats_sent < _STATS_EVERY_S:
            self._was_busy = True
            return
        self._was_busy = not idle
        self._stats_sent = now
        scheduler = self.scheduler
        self.links.events.send(
            EngineStats(
                instance=self.links.instance,
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                preemptions=scheduler.num_preemptions,
                free_blocks=scheduler.blocks.num_free,
            )
        )
        if idle:
            scheduler.check()
