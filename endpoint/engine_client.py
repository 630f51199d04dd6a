"""The endpoint's side of the engine channels: prompts in, tokens out, and the table of what is in flight."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
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
from engine.wire.messages import (
    Abort,
    EngineReady,
    EngineStats,
    LoraDone,
    LoraLoad,
    LoraUnload,
    Submit,
)
from engine.wire.ring import RingReader, RingWriter

log = logging.getLogger("server.engine_client")

_ERRORS: dict[int, type[ServerError]] = {
    cls.number: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ServerError)
}
_REFUSALS: dict[type[ServerError], str] = {
    errors.GenerationRefused: "the engine's cache cannot hold this request: prompt, answer and number of "
    "choices together; lower one of them, or give the server more cache (npuMemSize, kvCacheMemMiB)",
    errors.GrammarFailed: "the answer could not go on in the format asked for (response_format, "
    "structured_outputs, guided_*, tools): no token was legal, or finding one took too much; simplify it",
    EngineFailed: "the model produced no usable result for this request (its logits were not numbers)",
    errors.InvalidRequest: "the adapter of this request was unloaded before the request began; "
    "GET /v1/models lists the loaded ones",
}


_RING_FULL_S = 0.001
_RECORDS_PER_TURN = 8  # of the token ring; each is a few milliseconds at most


class Token(NamedTuple):
    """One row of a token record, stamped with the time it was read (monotonic seconds)."""

    branch: int  # the flight's number: those of its first part come first
    token_id: int
    finish: FinishCode
    batch_size: int
    queue_wait_us: int
    at: float
    logprob: float
    top: Sequence[tuple[int, float]]


class PromptRow(NamedTuple):
    """What the model thought of one token of a prompt, the first of which it cannot foresee."""

    token_id: int
    logprob: float
    rank: int  # 1: it was the most likely one
    others: Sequence[tuple[int, float]]  # the most likely ones without it, best first


@dataclass(slots=True, eq=False)
class Part:
    """One prompt of a request: to the engine it is a request of its own."""

    request_id: int
    link: InstanceLink
    flight: Flight
    first: int  # the flight's number of its branch 0
    ended: set[int] = field(default_factory=set)  # its branches without further tokens, by its own numbers
    prompt_rows: list[PromptRow] = field(default_factory=list)  # when asked for: all before the first token


@dataclass(slots=True, eq=False)
class Flight:
    """One request in the engine, from Submit to the last row of its last branch. Read by one task only."""

    branches: int  # of each part
    arrival: float  # monotonic seconds; when the HTTP request came
    submitted: float  # when it set out for the engine
    last_token: float  # when the last token came, or the request was submitted
    token_limit_s: float  # longest wait between two tokens
    parts: list[Part] = field(default_factory=list)
    _cancelled: bool = False
    _arrived: deque[Token] = field(default_factory=deque)
    _failure: ServerError | None = None
    _waiter: asyncio.Future[None] | None = None

    def __str__(self) -> str:
        return ", ".join(str(part.request_id) for part in self.parts)

    async def next(self) -> Token | None:
        """The next token, None when the request was cancelled. Raises the ServerError that ended it."""
        while not self._arrived:
            if self._cancelled:
                return None
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

    @classmethod
    def never_flown(cls, arrival: float) -> Flight:
        """Of a request that was cancelled before it reached the engine."""
        return cls(1, arrival, arrival, arrival, math.inf, _cancelled=True)

    def cancel(self) -> None:
        """End the request with what it has."""
        self._cancelled = True
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
        self.adapter_waits: dict[str, asyncio.Future[str]] = {}  # by adapter: the answer that is awaited
        self.num_parts = 0  # in flight


class EngineClient:
    """Submits requests to the least loaded instance and hands every token row to its flight.

    Lives on the event loop's thread; nothing here blocks.
    """

    def __init__(self, wires: Sequence[InstanceWire], context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """`failure` ends with an exception when what came from an engine cannot be understood."""
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._links = [InstanceLink(wire, context) for wire in wires]
        self._parts: dict[int, Part] = {}  # by request id
        self.last_token_at = 0.0  # monotonic seconds; of any request
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

    # -- adapters -----------------------------------------------------------------------------------

    async def change_adapters(self, command: LoraLoad | LoraUnload) -> str:
        """Have every instance carry it out; what is wrong with it, "" when all have.

        Only one change of a name at a time. Raises ServiceUnavailable or EngineFailed when an instance is or
        gets lost.
        """
        waits = []
        for link in self._links:
            _check_up(link)
            wait: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            link.adapter_waits[command.name] = wait
            waits.append(wait)
            if not link.commands.send(command):
                raise ServiceUnavailable("the model instance died; try again later", retry_after_s=5)
        faults = await asyncio.gather(*waits)
        return next((fault for fault in faults if fault), "")

    # -- requests -----------------------------------------------------------------------------------

    async def submit(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        priority: int,
        *,
        arrival: float,
        token_limit_s: float,
    ) -> Flight:
        """Send the prompts of a request on their way, each to the instance with the least to do.

        All have as many branches. Raises ServiceUnavailable when no instance can take one of them; the others
        are then aborted.
        """
        now = time.monotonic()
        flight = Flight(prompts[0][1].branches, arrival, now, now, token_limit_s)
        try:
            for prompt_ids, sampling in prompts:
                await self._submit_part(flight, prompt_ids, sampling, priority)
        except BaseException:
            self.close(flight)
            raise
        flight.last_token = time.monotonic()  # not sooner: putting many prompts on their way may take long
        return flight

    async def _submit_part(
        self, flight: Flight, prompt_ids: Sequence[int], sampling: SamplingParams, priority: int
    ) -> None:
        candidates = [link for link in self._links if link.ready is not None and link.down is None]
        if not candidates:
            raise ServiceUnavailable(
                "no model instance can take requests now; try again later", retry_after_s=5
            )
        link = min(candidates, key=lambda candidate: candidate.num_parts)
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
        part = Part(request_id, link, flight, len(flight.parts) * flight.branches)
        flight.parts.append(part)
        self._parts[request_id] = part
        link.num_parts += 1

    def close(self, flight: Flight) -> None:
        """The reader is done with this flight; aborts what of it still runs in the engine."""
        for part in flight.parts:
            self._close_part(part)

    def _close_part(self, part: Part) -> None:
        if self._forget(part) and part.link.down is None:
            part.link.commands.send(Abort(part.request_id, branch=-1))

    def end_branch(self, flight: Flight, branch: int) -> None:
        """No further tokens of this branch are wanted."""
        part = flight.parts[branch // flight.branches]
        branch -= part.first
        if branch in part.ended:
            return
        part.ended.add(branch)
        if len(part.ended) == flight.branches:
            self._close_part(part)
        elif part.link.down is None:
            part.link.commands.send(Abort(part.request_id, branch))

    def instance_down(self, instance: int, reason: str) -> None:
        link = self._links[instance]
        link.down = reason
        for wait in link.adapter_waits.values():
            if not wait.done():
                wait.set_exception(EngineFailed("the model instance died while its adapters were changed"))
        link.adapter_waits.clear()
        for part in list(self._parts.values()):
            if part.link is link:
                self._forget(part)
                part.flight.fail(
                    EngineFailed("the model instance serving this request died; send the request again")
                )

    def _forget(self, part: Part) -> bool:
        """Whether it was still known."""
        if self._parts.pop(part.request_id, None) is None:
            return False
        part.link.num_parts -= 1
        return True

    # -- what comes back ----------------------------------------------------------------------------

    def _guarded(self, callback: Callable[[InstanceLink], None], link: InstanceLink) -> None:
        """An event loop only logs what a callback raises; lost rows would be requests that never end."""
        try:
            callback(link)
        except Exception as error:
            if not self.failure.done():
                self.failure.set_exception(error)

    def _on_tokens(self, link: InstanceLink) -> None:
        for _ in range(_RECORDS_PER_TURN):
            slot = link.tokens.take()
            if slot is None:
                return
            batch_size, rows = layout.read_tokens(slot)
            link.tokens.release()
            now = self.last_token_at = time.monotonic()
            for row in rows:
                part = self._parts.get(row.request_id)
                if part is None or row.branch in part.ended:
                    continue  # aborted; the step was already under way
                flight = part.flight
                if row.rank:
                    part.prompt_rows.append(PromptRow(row.token, row.logprob, row.rank, row.top))
                    continue
                if row.finish:
                    part.ended.add(row.branch)
                    if len(part.ended) == flight.branches:
                        self._forget(part)
                    elif row.error:
                        self._close_part(part)  # nobody waits for its other branches any more
                if row.error:
                    cls = _ERRORS[row.error]
                    flight.fail(cls(_REFUSALS.get(cls, "the engine ended this request")))
                    continue
                flight.push(
                    Token(
                        part.first + row.branch,
                        row.token,
                        FinishCode(row.finish),
                        batch_size,
                        row.queue_wait_us,
                        now,
                        row.logprob,
                        row.top,
                    )
                )
        # prompts with log-probabilities come in hundreds of records: others want their turn
        asyncio.get_running_loop().call_soon(self._guarded, self._on_tokens, link)

    def _on_events(self, link: InstanceLink) -> None:
        for message in link.events.receive():
            if isinstance(message, EngineReady):
                link.ready = message
                if all(other.ready is not None for other in self._links):
                    self._all_ready.set()
            elif isinstance(message, EngineStats):
                link.stats = message
            elif isinstance(message, LoraDone):
                wait = link.adapter_waits.pop(message.name, None)
                if wait is not None and not wait.done():
                    wait.set_result(message.error)
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
