"""The endpoint's side of the engine channels: prompts in, tokens out, and the table of what is in flight."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import zmq

from endpoint.metadata import Occupancy
from engine import errors
from engine.errors import EngineFailed, ServerError, ServiceUnavailable
from engine.outcome import FinishCode
from engine.sampling_params import SamplingParams
from engine.wire import layout
from engine.wire.channel import Channel
from engine.wire.links import InstanceWire
from engine.wire.messages import Abort, EngineReady, EngineStats, Submit
from engine.wire.ring import RingReader, RingWriter

log = logging.getLogger("server.engine_client")

_ERRORS: dict[int, type[ServerError]] = {
    cls.number: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ServerError)
}
_REFUSALS: dict[type[ServerError], str] = {
    errors.GenerationRefused: "the engine's cache cannot hold this request: prompt, answer and number of "
    "choices together; lower one of them, or give the server more cache (npuMemSize, kvCacheMemMiB)",
    EngineFailed: "the model produced no usable result for this request (its logits were not numbers)",
}


_RING_FULL_S = 0.001


class Token(NamedTuple):
    """One row of a token record, stamped with the time it was read (monotonic seconds)."""

    branch: int
    token_id: int
    finish: FinishCode
    batch_size: int
    queue_wait_us: int
    at: float
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(slots=True)
class Flight:
    """One request in the engine, from Submit to the last row of its last branch. Read by one task only."""

    request_id: int
    link: InstanceLink
    branches: int
    arrival: float  # monotonic seconds; when the HTTP request came
    submitted: float
    last_token: float  # when the last token came, or the request was submitted
    token_limit_s: float  # longest wait between two tokens
    ended: set[int] = field(default_factory=set)  # branches without further tokens
    cancelled: bool = False  # the next token of each branch is its last
    _arrived: deque[Token] = field(default_factory=deque)
    _failure: ServerError | None = None
    _waiter: asyncio.Future[None] | None = None

    async def next(self) -> Token:
        """The next token. Raises the ServerError that ended the request instead."""
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._arrived.popleft()

    def push(self, token: Token) -> None:
        self._arrived.append(token)
        self.last_token = token.at
        self._wake()

    def fail(self, error: ServerError) -> None:
        """End the request with an error, after what has already arrived."""
        if self._failure is None:
            self._failure = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class InstanceLink:
    """Our ends of one instance's channels."""

    def __init__(self, wire: InstanceWire, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.instance = wire.instance
        self.commands = Channel(context, zmq.PUSH, wire.command_address)
        self.events = Channel(context, zmq.PULL, wire.event_address, bind=True)
        self.prompts = RingWriter(wire.prompt_ring)
        self.prompt_lock = asyncio.Lock()  # record and Submit must leave in the same order
        self.tokens = RingReader(wire.token_ring)
        self.ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.down: str | None = None  # why it can take no more requests
        self.num_flights = 0


class EngineClient:
    """Submits requests to the least loaded instance and hands every token row to its flight.

    Lives on the event loop's thread; nothing here blocks.
    """

    def __init__(self, wires: Sequence[InstanceWire], context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """`failure` ends with an exception when what came from an engine cannot be understood."""
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._links = [InstanceLink(wire, context) for wire in wires]
        self._flights: dict[int, Flight] = {}
        self._ids = itertools.count(1)
        self._all_ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        for link in self._links:
            loop.add_reader(link.tokens.fileno(), self._guarded, self._on_tokens, link)
            loop.add_reader(link.events.fileno(), self._guarded, self._on_events, link)

    # -- state --------------------------------------------------------------------------------------

    async def wait_ready(self) -> EngineReady:
        """Until every instance has reported; the limits all of them can take."""
        for link in self._links:
            self._on_events(link)  # what came before the reader was installed gives no edge
        await self._all_ready.wait()
        while not all(link.commands.connected for link in self._links):
            await asyncio.sleep(0.005)
        return self.limits()

    def limits(self) -> EngineReady:
        """What every instance can take; only once all are ready."""
        readies = [link.ready for link in self._links if link.ready is not None]
        return min(readies, key=lambda ready: (ready.max_prompt_tokens, ready.num_blocks))

    @property
    def available(self) -> bool:
        return any(link.ready is not None and link.down is None for link in self._links)

    def occupancy(self) -> list[Occupancy]:
        """How full each instance is, at most a second old."""
        return [_occupancy(link) for link in self._links]

    def flights(self) -> list[Flight]:
        return list(self._flights.values())

    # -- requests -----------------------------------------------------------------------------------

    async def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        priority: int,
        *,
        arrival: float,
        token_limit_s: float,
    ) -> Flight:
        """Send a request on its way. Raises ServiceUnavailable when no instance can take it."""
        candidates = [link for link in self._links if link.ready is not None and link.down is None]
        if not candidates:
            raise ServiceUnavailable(
                "no model instance can take requests now; try again later", retry_after_s=5
            )
        link = min(candidates, key=lambda candidate: candidate.num_flights)
        request_id = next(self._ids)
        async with link.prompt_lock:
            _check_up(link)  # the wait may have been long
            slot = link.prompts.reserve()
            while slot is None:  # the leader drains the ring between steps
                await asyncio.sleep(_RING_FULL_S)
                _check_up(link)
                slot = link.prompts.reserve()
            layout.write_prompt(slot, request_id, np.asarray(prompt_ids, np.int32))
            link.prompts.commit()
            if not link.commands.send(Submit(request_id, len(prompt_ids), priority, sampling)):
                raise ServiceUnavailable("the model instance died; try again later", retry_after_s=5)
        now = time.monotonic()
        flight = Flight(request_id, link, sampling.branches, arrival, now, now, token_limit_s)
        self._flights[request_id] = flight
        link.num_flights += 1
        return flight

    def close(self, flight: Flight) -> None:
        """The reader is done with this flight; aborts it in the engine when it still runs there."""
        if self._forget(flight.request_id) is not None and flight.link.down is None:
            flight.link.commands.send(Abort(flight.request_id, branch=-1))

    def end_branch(self, flight: Flight, branch: int) -> None:
        """No further tokens of this branch are wanted."""
        if branch in flight.ended:
            return
        flight.ended.add(branch)
        if len(flight.ended) == flight.branches:
            self.close(flight)
        elif flight.link.down is None:
            flight.link.commands.send(Abort(flight.request_id, branch))

    def instance_down(self, instance: int, reason: str) -> None:
        link = self._links[instance]
        link.down = reason
        for flight in self.flights():
            if flight.link is link:
                self._forget(flight.request_id)
                flight.fail(
                    EngineFailed("the model instance serving this request died; send the request again")
                )

    def _forget(self, request_id: int) -> Flight | None:
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            flight.link.num_flights -= 1
        return flight

    # -- what comes back ----------------------------------------------------------------------------

    def _guarded(self, callback: Callable[[InstanceLink], None], link: InstanceLink) -> None:
        """An event loop only logs what a callback raises; lost rows would be requests that never end."""
        try:
            callback(link)
        except Exception as error:
            if not self.failure.done():
                self.failure.set_exception(error)

    def _on_tokens(self, link: InstanceLink) -> None:
        while (slot := link.tokens.take()) is not None:
            batch_size, rows = layout.read_tokens(slot)
            link.tokens.release()
            now = time.monotonic()
            for row in rows:
                flight = self._flights.get(row.request_id)
                if flight is None or row.branch in flight.ended:
                    continue  # aborted; the step was already under way
                if row.finish:
                    flight.ended.add(row.branch)
                    if len(flight.ended) == flight.branches or row.error:
                        self._forget(row.request_id)
                if row.error:
                    cls = _ERRORS[row.error]
                    flight.fail(cls(_REFUSALS.get(cls, "the engine ended this request")))
                    continue
                flight.push(
                    Token(
                        row.branch,
                        row.token,
                        FinishCode(row.finish),
                        batch_size,
                        row.queue_wait_us,
                        now,
                        row.logprob,
                        row.top,
                    )
                )

    def _on_events(self, link: InstanceLink) -> None:
        for message in link.events.receive():
            if isinstance(message, EngineReady):
                link.ready = message
                if all(other.ready is not None for other in self._links):
                    self._all_ready.set()
            elif isinstance(message, EngineStats):
                link.stats = message
            else:
                log.warning("unexpected %s on the event channel", type(message).__name__)


def _check_up(link: InstanceLink) -> None:
    if link.down is not None:
        raise ServiceUnavailable("the model instance died; try again later", retry_after_s=5)


def _occupancy(link: InstanceLink) -> Occupancy:
    total = link.ready.num_blocks if link.ready else 0
    if link.stats is None:  # nothing has run yet
        return Occupancy(0, 0, 0, total, total)
    stats = link.stats
    return Occupancy(stats.running, stats.waiting, 0, stats.free_blocks, total, stats.preemptions)
