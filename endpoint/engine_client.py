"""The endpoint's side of the engine channels: prompts in, tokens out.

What is in flight (in_flight.py) keeps of every request its prompt and the tokens it has got. So a request
whose instance dies goes on in another one, or in the same one once it has been replaced: the new engine is
handed both, computes them again as after a preemption, and continues with the next token.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import zmq

from endpoint.adapter_changes import (
    bring_in_line,
    load_everywhere,
    note_death,
    note_done,
    unload_everywhere,
)
from endpoint.bounds import Bounds
from endpoint.flights import Flight, Part
from endpoint.in_flight import InFlight
from endpoint.instance_choice import InstanceChoice
from endpoint.instance_link import InstanceLink
from endpoint.metadata import Occupancy
from engine.errors import EngineFailed, ServiceUnavailable
from engine.sampling_params import SamplingParams
from engine.wire import layout
from engine.wire.links import InstanceWire
from engine.wire.messages import EngineReady, EngineStats, LoraDone, Submit

log = logging.getLogger("server.engine_client")

_DIED = "the model instance serving this request died; send the request again"
_CRASHES = 2  # of instances it was in, until a request is taken for their cause

_RING_FULL_S = 0.001
_CONNECT_S = 0.005  # between two looks at whether a new leader has been reached
_RECORDS_PER_TURN = 8  # of the token ring; each is a few milliseconds at most


class EngineClient:
    """Submits requests to one instance or another and hands every token row to its flight.

    Lives on the event loop's thread; nothing here blocks. Its instances are opened and closed as the parent
    says.
    """

    def __init__(
        self,
        wires: Sequence[InstanceWire],
        context: zmq.Context[zmq.Socket[bytes]],
        wanted_adapters: Callable[[Mapping[str, str]], Mapping[str, str]],
        on_serving: Callable[[int, int], None],
        choice: InstanceChoice,
    ) -> None:
        """`failure` ends with an exception when what came from an engine cannot be understood.

        `wanted_adapters`: name and directory of the adapters an instance has -> of those it has to have.
        `on_serving(instance, generation)` is called when an instance takes requests. `choice`: of an instance
        for each prompt.
        """
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._links = [InstanceLink(wire, context) for wire in wires]
        self._wanted_adapters = wanted_adapters
        self._on_serving = on_serving
        self._choice = choice
        self._in_flight = InFlight()
        self._parked: list[Part] = []  # between two instances
        self._given_up: set[int] = set()  # instances that do not come back
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()  # an instance has begun to serve

    # -- instances coming and going -----------------------------------------------------------------

    def open_instance(self, instance: int, generation: int) -> None:
        link = self._links[instance]
        ends = link.open(generation)
        loop = asyncio.get_running_loop()
        loop.add_reader(ends.tokens.fileno(), self._guarded, self._on_tokens, link)
        loop.add_reader(ends.events.fileno(), self._guarded, self._on_events, link)
        self._guarded(self._on_events, link)  # what came before the reader was installed gives no edge

    def close_instance(self, instance: int, *, final: bool) -> int:
        """The instance is dead; the generation of the link that is closed with it.

        Its requests wait for the next one, but those that cannot go on. `final`: it does not come back.
        """
        link = self._links[instance]
        if final:
            self._given_up.add(instance)
        if link.ends is not None:
            self._read_the_rest(link)
            loop = asyncio.get_running_loop()
            loop.remove_reader(link.ends.tokens.fileno())
            loop.remove_reader(link.ends.events.fileno())
            link.ends.commands.close()
            link.ends.events.close()
            link.ends = None
        link.serving, link.stats = False, None
        note_death(link)
        for part in self._in_flight.forget_all(link):
            part.crashes += 1
            if part.crashes < _CRASHES and part.resumable:
                self._park(part)
            else:
                part.flight.fail(EngineFailed(_DIED))
        self._unpark()
        return link.generation

    def _read_the_rest(self, link: InstanceLink) -> None:
        """What it had told before it died is as good as ever."""
        try:
            while link.ends is not None and self._in_flight.read_record(link.ends):
                pass
        except Exception:
            log.exception("instance %d died with records that cannot be read", link.instance)

    def _park(self, part: Part) -> None:
        if part.over:
            return
        part.prompt_rows = [] if not any(part.outputs) else part.prompt_rows  # told once more, from the start
        if len(self._given_up) == len(self._links):
            part.flight.fail(EngineFailed(_DIED))
        else:
            self._parked.append(part)

    def _unpark(self) -> None:
        """Send on what waits for an instance, if one is there; end it if none will ever be."""
        parked, self._parked = self._parked, []
        if not any(link.serving for link in self._links):
            for part in parked:
                self._park(part)
            return
        for part in parked:
            self._run(self._send(part))

    async def _begin_to_serve(self, link: InstanceLink, ready: EngineReady) -> None:
        """A new leader has greeted: give it the adapters it lacks, then the requests that wait."""
        ends = link.ends
        assert ends is not None
        while not ends.commands.connected:
            await asyncio.sleep(_CONNECT_S)
            if link.ends is not ends:
                return  # it has died again; what comes next is its successor's
        if not await bring_in_line(link, ends, dict(ready.adapters), self._wanted_adapters):
            return
        link.serving = True
        self._changed.set()
        self._on_serving(link.instance, link.generation)
        self._unpark()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run beside everything else; its failure is ours."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self.fail(error)

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(ended)

    def fail(self, error: BaseException) -> None:
        """End this process: nobody knows any more what belongs to whom."""
        if not self.failure.done():
            self.failure.set_exception(error)

    # -- state --------------------------------------------------------------------------------------

    async def wait_ready(self, *, every: bool = True) -> EngineReady:
        """Until every instance serves, or any; the limits all of them can take."""
        serve = all if every else any
        while not serve(link.serving for link in self._links):
            self._changed.clear()
            await self._changed.wait()
        return self.limits()

    def limits(self) -> EngineReady:
        """What every instance can take; only once one is ready."""
        readies = [link.ready for link in self._links if link.ready is not None]
        return min(readies, key=lambda ready: (ready.max_prompt_tokens, ready.num_blocks))

    @property
    def last_token_at(self) -> float:
        """When a token came, of any request; monotonic seconds."""
        return self._in_flight.last_token_at

    @property
    def available(self) -> bool:
        return any(link.serving for link in self._links)

    @property
    def recovering(self) -> bool:
        """No instance can take requests now, but one is coming."""
        return not self.available and len(self._given_up) < len(self._links)

    def occupancy(self) -> list[Occupancy]:
        """How full each instance is, at most a second old."""
        return [_occupancy(link) for link in self._links]

    def register_bounds(self, bounds: Bounds) -> None:
        links = self._links
        bounds.register(
            "prompt_ring",
            lambda: sum(link.ends.prompts.num_used for link in links if link.ends is not None),
            sum(link.wire.prompt_ring.slots for link in links),
        )
        bounds.register(
            "token_ring",
            lambda: sum(link.ends.tokens.num_used for link in links if link.ends is not None),
            sum(link.wire.token_ring.slots for link in links),
        )
        bounds.register(
            "kv_blocks",
            lambda: sum(each.total_blocks - each.free_blocks for each in self.occupancy()),
            lambda: sum(each.total_blocks for each in self.occupancy()),
        )

    # -- adapters -----------------------------------------------------------------------------------

    async def load_adapter(self, name: str, path: str) -> str:
        """Have every instance load it; see load_everywhere."""
        return await load_everywhere(self._links, name, path)

    async def unload_adapter(self, name: str) -> None:
        """Until no instance holds it; see unload_everywhere."""
        await unload_everywhere(self._links, name)

    # -- requests -----------------------------------------------------------------------------------

    async def submit(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        priority: int,
        *,
        arrival: float,
        token_limit_s: float,
        cache_salt: bytes = b"",
    ) -> Flight:
        """Send the prompts of a request on their way, each to the instance that InstanceChoice names.

        All have as many branches. `cache_salt`: see Submit. Raises ServiceUnavailable when no instance can
        take one of them; the others are then aborted.
        """
        now = time.monotonic()
        flight = Flight(prompts[0][1].branches, arrival, now, now, token_limit_s)
        try:
            for prompt_ids, sampling in prompts:
                await self._submit_part(flight, prompt_ids, sampling, priority, cache_salt)
        except BaseException:
            self.close(flight)
            raise
        flight.last_token = time.monotonic()  # not sooner: putting many prompts on their way may take long
        return flight

    async def _submit_part(
        self,
        flight: Flight,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        priority: int,
        cache_salt: bytes,
    ) -> None:
        if not self.available and not self.recovering:
            raise ServiceUnavailable(
                "no model instance can take requests now; try again later", retry_after_s=5
            )
        part = Part(
            flight,
            len(flight.parts) * flight.branches,
            np.asarray(prompt_ids, np.int32),
            sampling,
            priority,
            [[] for _ in range(flight.branches)],
            cache_salt,
        )
        flight.parts.append(part)
        await self._send(part)

    async def _send(self, part: Part) -> None:
        """Put a part on its way to an instance; with none there, it waits for one."""
        while (chosen := self._choice.choose(self._links, part)) is not None:
            link, part.place = chosen  # while it waits for the lock as well: others are to see it
            try:
                async with link.prompt_lock:
                    if part.over or await self._write(part, link):
                        return
            finally:
                if part.link is not link:
                    part.leave_place()
        self._park(part)

    async def _write(self, part: Part, link: InstanceLink) -> bool:
        """Whether the instance has got it; False when it is not there any more."""
        ends = link.ends
        if ends is None or not link.serving:  # a successor that has not greeted yet does not read either
            return False
        counts, ids = part.progress()
        pieces = layout.prompt_pieces(ends.prompts.slot_bytes, ids)
        if len(pieces) > ends.prompts.slots:
            part.flight.fail(EngineFailed(_DIED))  # too long to be taken up again
            return True
        while not ends.prompts.has_room(len(pieces)):  # the leader drains the ring between steps
            await asyncio.sleep(_RING_FULL_S)
            if link.ends is not ends:
                return False
        # from here on nothing can come between: pieces without their Submit would be taken for the next one's
        request_id = next(self._ids)
        for piece in pieces:
            slot = ends.prompts.reserve()
            assert slot is not None
            layout.write_prompt(slot, request_id, piece)
            ends.prompts.commit()
        submit = Submit(request_id, len(part.prompt), part.priority, counts, part.cache_salt, part.sampling)
        if not ends.commands.send(submit):
            link.serving = False  # its leader is gone; the parent is about to say so
            return False
        self._in_flight.add(part, request_id, link)
        return True

    def close(self, flight: Flight) -> None:
        """The reader is done with this flight; aborts what of it still runs in the engine."""
        flight.cancel()  # what waits for an instance is not sent any more
        for part in flight.parts:
            self._in_flight.close(part)

    def end_branch(self, flight: Flight, branch: int) -> None:
        """No further tokens of this branch are wanted."""
        self._in_flight.end_branch(flight, branch)

    # -- what comes back ----------------------------------------------------------------------------

    def _guarded(self, callback: Callable[[InstanceLink], None], link: InstanceLink) -> None:
        """An event loop only logs what a callback raises; lost rows would be requests that never end."""
        try:
            callback(link)
        except Exception as error:
            self.fail(error)

    def _on_tokens(self, link: InstanceLink) -> None:
        for _ in range(_RECORDS_PER_TURN):
            ends = link.ends
            if ends is None or not self._in_flight.read_record(ends):
                return
            if not ends.tokens.num_at_hand:
                return  # what has been filled meanwhile wakes us again: looking for it costs a system call
        # prompts with log-probabilities come in hundreds of records: others want their turn
        asyncio.get_running_loop().call_soon(self._guarded, self._on_tokens, link)

    def _on_events(self, link: InstanceLink) -> None:
        if link.ends is None:
            return
        for message in link.ends.events.receive():
            if isinstance(message, EngineReady):
                link.ready = message
                self._run(self._begin_to_serve(link, message))
            elif isinstance(message, EngineStats):
                link.stats = message
            elif isinstance(message, LoraDone):
                note_done(link, message)
            else:
                log.warning("unexpected %s on the event channel", type(message).__name__)


def _occupancy(link: InstanceLink) -> Occupancy:
    total = link.total_blocks if link.serving else 0
    if link.stats is None:  # nothing has run yet
        return Occupancy(0, 0, 0, total, total)
    stats = link.stats
    return Occupancy(
        running=stats.running,
        waiting=stats.waiting,
        swapped=stats.swapped,
        free_blocks=stats.free_blocks,
        total_blocks=total,
        preemptions=stats.preemptions,
        prefix_tokens=stats.prefix_tokens,
        prefix_hits=stats.prefix_hits,
        guessed_tokens=stats.guessed_tokens,
        right_guesses=stats.right_guesses,
        host_blocks=stats.host_blocks,
        free_host_blocks=stats.free_host_blocks,
    )
