"""The step loop of an engine instance: receive, schedule, run, commit, publish."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

from engine.adapters import AdapterDesk, AdapterStore
from engine.endpoint_link import EndpointLink
from engine.errors import InvalidRequest
from engine.executor import Executor
from engine.outcome import Outcome
from engine.plan import StepPlan
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from engine.wire.channel import Channel
from engine.wire.messages import (
    Abort,
    EndpointDown,
    EndpointUp,
    EngineStats,
    LoraLoad,
    LoraUnload,
    Quiet,
    Submit,
)
from engine.wire.vitals import Pulse

log = logging.getLogger("llm.core")

_STATS_EVERY_S = 1.0
_GREETING_S = 0.01  # between two tries to reach a new endpoint
_TOKEN_LIMIT_S = 0.02  # what each token of a step adds to its time limit: 50 tokens/s are slow everywhere
_WAKES = 4  # how often an idle loop shows that it lives, within its time limit


@dataclass(slots=True)
class StepTimes:
    """Where the time of all steps went, in seconds; scripts/profile_step.py prints it."""

    steps: int = 0
    receive: float = 0.0
    schedule: float = 0.0  # choosing the batch and laying out its arrays
    run: float = 0.0  # forward and sampling, split further by the executor
    commit: float = 0.0
    publish: float = 0.0

    def add(self, marks: Seq[float]) -> None:
        """One more step; `marks`: when its first stage began, and when each of them ended."""
        receive, schedule, run, commit, publish = (end - start for start, end in pairwise(marks))
        self.steps += 1
        self.receive += receive
        self.schedule += schedule
        self.run += run
        self.commit += commit
        self.publish += publish


@dataclass(slots=True)
class Watched:
    """How the parent watches over this process."""

    control: Channel  # EndpointDown, EndpointUp in; Quiet out
    pulse: Pulse
    step_timeout_s: float  # of a step, besides what its tokens add


def step_limit_s(timeout_s: float, plan: StepPlan) -> float:
    """How long a step may take, with stepTimeoutSec `timeout_s`."""
    return timeout_s + plan.num_tokens * _TOKEN_LIMIT_S


@dataclass(slots=True)
class EngineCore:
    """Drives one scheduler and one executor until the process ends.

    A failure in a step is not caught here: ranks may be out of step then, and a process in an unknown state
    is worse than a dead one.
    """

    instance: int
    scheduler: Scheduler
    executor: Executor
    link: EndpointLink
    watched: Watched
    adapters: AdapterStore | None = None  # None: there are no weights that could be adapted
    times: StepTimes = field(default_factory=StepTimes)
    desk: AdapterDesk = field(init=False)
    _stats_sent: float = 0.0
    _was_busy: bool = False

    def __post_init__(self) -> None:
        self.desk = AdapterDesk(self.adapters, self.scheduler, self.link.send)

    def run(self) -> NoReturn:
        while True:
            self.step()

    def step(self) -> None:
        """One turn of the loop: at most one engine step, or a wait for something to do."""
        clock = time.perf_counter
        start = clock()
        self._receive()
        self.desk.settle()
        received = clock()
        plan = self.scheduler.schedule(time.monotonic())
        if plan is None:
            self._publish(self.scheduler.take_refused(), batch_size=0, step_us=0)
            self._wait()
            return
        self._promise(plan)
        scheduled = clock()
        sampled = self.executor.run(plan)
        computed = clock()
        # nothing may be published between schedule and commit: it may find out that the endpoint is gone
        outcomes = [*self.scheduler.take_refused(), *self.scheduler.commit(plan, sampled, time.monotonic())]
        committed = clock()
        self._publish(outcomes, plan.num_rows - plan.num_guessed, int((computed - scheduled) * 1e6))
        self.times.add((start, received, scheduled, computed, committed, clock()))
        self._send_stats()

    # -- in -----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        self._obey()
        for message in self.link.receive():
            if isinstance(message, Submit):
                self._admit(message)
            elif isinstance(message, Abort):
                self.scheduler.abort(message.request_id, None if message.branch < 0 else message.branch)
            elif isinstance(message, LoraLoad | LoraUnload):
                self.desk.receive(message)
            else:
                log.warning("unexpected %s on the command channel", type(message).__name__)

    def _obey(self) -> None:
        """What the parent says about the endpoint."""
        for message in self.watched.control.receive():
            if isinstance(message, EndpointDown):
                dropped = self.scheduler.abort_all()
                self.link.close()
                self.desk.settle()  # what was to leave is not to be in the next greeting
                self.watched.control.send(Quiet(self.instance, self.link.generation))
                log.warning("the endpoint is gone: %d request(s) dropped", dropped)
            elif isinstance(message, EndpointUp):
                self.link.open(message.generation)
            else:
                log.warning("unexpected %s on the control channel", type(message).__name__)

    def _admit(self, submit: Submit) -> None:
        ids = self.link.take_prompt(submit)
        prompt = ids[: submit.num_prompt_tokens]
        group = SequenceGroup(
            submit.request_id,
            prompt,
            submit.sampling,
            priority=submit.priority,
            now=time.monotonic(),
            cache_salt=submit.cache_salt,
        )
        group.resume(submit.outputs, ids[submit.num_prompt_tokens :])
        if self.desk.serves(submit.sampling.lora):
            self.scheduler.add(group)
        else:  # unloaded while the request was on its way here
            self.scheduler.refuse(group, InvalidRequest)

    def _wait(self) -> None:
        """Sleep until a message comes or the head of the waiting queue becomes due."""
        self._send_stats(idle=not self.scheduler.has_work)
        limit_s = self.watched.step_timeout_s
        timeout = limit_s / _WAKES
        due = self.scheduler.seconds_until_due(time.monotonic())
        if due is not None:
            timeout = min(timeout, due)
        if not self.link.greet():
            timeout = min(timeout, _GREETING_S)
        # sending may have taken the edge of what arrived meanwhile
        self._obey()
        self.watched.pulse.expect_within(limit_s)
        readers = [self.watched.control.fileno(), *self.desk.filenos()]
        if (commands := self.link.fileno()) is not None:
            readers.append(commands)
        select.select(readers, [], [], timeout)

    def _promise(self, plan: StepPlan) -> None:
        self.watched.pulse.expect_within(step_limit_s(self.watched.step_timeout_s, plan))

    # -- out ----------------------------------------------------------------------------------------

    def _publish(self, outcomes: Seq[Outcome], batch_size: int, step_us: int) -> None:
        if outcomes:
            self.link.publish(outcomes, self.times.steps, batch_size, step_us, self._while_full)

    def _while_full(self) -> None:
        self.watched.pulse.expect_within(self.watched.step_timeout_s)
        self._obey()

    def _send_stats(self, *, idle: bool = False) -> None:
        now = time.monotonic()
        if idle and not self._was_busy:
            return
        if not idle and self._was_busy and now - self._stats_sent < _STATS_EVERY_S:
            return
        self._was_busy = not idle
        self._stats_sent = now
        scheduler = self.scheduler
        self.link.send(
            EngineStats(
                instance=self.instance,
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                swapped=len(scheduler.swapped),
                preemptions=scheduler.num_preemptions,
                free_blocks=scheduler.blocks.num_free,
                prefix_tokens=scheduler.num_prefix_tokens,
                prefix_hits=scheduler.num_prefix_hits,
                guessed_tokens=scheduler.speculation.num_guessed if scheduler.speculation else 0,
                right_guesses=scheduler.speculation.num_right if scheduler.speculation else 0,
                host_blocks=scheduler.swap.num_blocks,
                free_host_blocks=scheduler.swap.num_free,
            )
        )
        if idle:
            scheduler.check()
