"""The step loop of MINDIE_ASYNC_SCHEDULING_ENABLE: a step is computed while the next one is planned.

A thread computes. When it has a result it goes on with the next step at once, and this loop has as long as
that takes to tell the result, to hear what is new, and to plan the step after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.executor import Executor, Sampled
from engine.lookahead import MOST_IN_FLIGHT, Flight, Lookahead


class StepThread:
    """Computes steps one after the other, in the order in which they are started."""

    def __init__(self, executor: Executor, set_up: Callable[[], None] = lambda: None) -> None:
        """`set_up`: called once by the thread, before its first step."""
        self._executor = executor
        self._pool = ThreadPoolExecutor(1, "step", set_up)
        self._results: deque[Future[Sampled]] = deque()

    def start(self, flight: Flight) -> None:
        self._results.append(self._pool.submit(self._compute, flight))

    def result(self) -> Sampled:
        """Of the first step whose result has not been taken. Waits for it; raises what computing it has."""
        return self._results.popleft().result()

    def _compute(self, flight: Flight) -> Sampled:
        start = time.perf_counter()
        flight.fill_in()
        sampled = self._executor.run(flight.plan)
        flight.settle(sampled)
        flight.seconds = time.perf_counter() - start
        return sampled


@dataclass(slots=True)
class OverlappedCore(EngineCore):
    """As EngineCore, and with the same answers. `StepTimes.run` is what the loop waits for results."""

    set_up_thread: Callable[[], None] = lambda: None  # for the thread that computes
    _lookahead: Lookahead = field(init=False)
    _thread: StepThread = field(init=False)

    def __post_init__(self) -> None:
        EngineCore.__post_init__(self)
        self._lookahead = Lookahead(self.scheduler)
        self._thread = StepThread(self.executor, self.set_up_thread)

    def step(self) -> None:
        """One turn of the loop: the result of one engine step, or a wait for something to do."""
        clock = time.perf_counter
        start = clock()
        self._receive()
        if not self._lookahead.in_flight:
            self.desk.settle()
        received = clock()
        self._fill()
        if not self._lookahead.in_flight:
            self._publish(self.scheduler.take_refused(), batch_size=0, step_us=0)
            self._wait()
            return
        flight = self._lookahead.first
        self._promise(flight.plan)
        scheduled = clock()
        sampled = self._thread.result()
        computed = clock()
        batch_size = flight.num_wanted
        outcomes = [*self.scheduler.take_refused(), *self._lookahead.commit(sampled, time.monotonic())]
        committed = clock()
        self._publish(outcomes, batch_size, int(flight.seconds * 1e6))
        self.times.add((start, received, scheduled, computed, committed, clock()))
        self._send_stats()

    def _fill(self) -> None:
        """Start what can be planned: only one while adapters come or go, which they do between steps."""
        most = 1 if self.desk.is_busy else MOST_IN_FLIGHT
        while self._lookahead.in_flight < most:
            flight = self._lookahead.plan(time.monotonic())
            if flight is None:
                return
            self._thread.start(flight)
