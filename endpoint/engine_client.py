"""The endpoint's side of the engine channels: prompts in, tokens out, and the table of what is in flight.

The table knows of every request its prompt and the tokens it has got, so a request whose instance dies goes
on in another one, or in the same one once it has been replaced: the new engine is handed both, computes them
again as after a preemption, and continues with the next token.
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

from endpoint.bounds import Bounds
from endpoint.flights import Flight, Part, PromptRow, Token
from endpoint.instance_choice import InstanceChoice
from endpoint.instance_link import InstanceLink, LinkEnds
from endpoint.metadata import Occupancy
from engine import errors
from engine.errors import EngineFailed, ServerError, ServiceUnavailable
from engine.outcome import FinishCode
from engine.sampling_params import SamplingParams
from engine.wire import layout
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

log = logging.getLogger("server.engine_client")

_ERRORS: dict[int, type[ServerError]] = {
    cls.number: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ServerError)
}
_REFUSALS: dict[type[ServerError], str] = {
    errors.GenerationRefused: "the engine's cache cannot hold this request: prompt, answer and number of "
    "choices together; lower one of them, or give the server more cache (npuMemSize, kvCacheMemMiB)",
    errors.GrammarFailed: "the answer could not go on in the format asked for (response_format, "
    "structured_outputs, guided_*, tools): no token was legal, or finding one took too much; simplify it",
    EngineFailed: "the model produced no usable result for this request (its logits were not numbers, "
    "or there was no memory for it alone; the server log tells)",
    errors.InvalidRequest: "the adapter of this request was unloaded before the request began; "
    "GET /v1/models lists the loaded ones",
}


_DIED = "the model instance serving this request died; send the request again"
_FINISH_CODES = tuple(FinishCode)  # FinishCode(number) takes 1 us
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
        self._parts: dict[int, Part] = {}  # by request id
        self._parked: list[Part] = []  # between two instances
        self._given_up: set[int] = set()  # instances that do not come back
        self._tasks: set[asyncio.Task[None]] = set()
        self.last_token_at = 0.0  # monotonic seconds; of any request
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
        for wait in link.adapter_waits.values():
            if not wait.done():
                wait.set_exception(EngineFailed("the model instance died while its adapters were changed"))
        link.adapter_waits.clear()
        for part in [part for part in self._parts.values() if part.link is link]:
            self._forget(part)
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
            while link.ends is not None and self._read_record(link, link.ends):
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
        if not await self._bring_adapters_in_line(link, ends, dict(ready.adapters)):
            return
        link.serving = True
        self._changed.set()
        self._on_serving(link.instance, link.generation)
        self._unpark()

    async def _bring_adapters_in_line(self, link: InstanceLink, ends: LinkEnds, has: dict[str, str]) -> bool:
        """Until it has what it has to have, which may change meanwhile; False when it has died over it."""
        tried: set[str] = set()
        while True:
            wanted = self._wanted_adapters(has)
            commands: list[LoraLoad | LoraUnload] = [LoraUnload(name) for name in has if name not in wanted]
            lacking = [name for name in wanted if name not in has and name not in tried]
            commands += [LoraLoad(name, wanted[name]) for name in lacking]
            if not commands:
                return True
            for command in commands:
                try:
                    fault = await self._change_adapter(link, command)
                except ServerError as error:
                    fault = str(error)
                if link.ends is not ends:
                    return False
                if fault:
                    log.error("instance %d, adapter %s: %s", link.instance, command.name, fault)
                elif isinstance(command, LoraLoad):
                    has[command.name] = command.path
            tried.update(lacking)
            has = {name: path for name, path in has.items() if name in wanted}

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
        """Have every instance load it; what is wrong with it, "" when all have.

        Only one change of a name at a time. Raises ServiceUnavailable or EngineFailed when an instance is or
        gets lost; others may have it by then.
        """
        if not all(link.serving for link in self._links):
            raise ServiceUnavailable("a model instance is not there now; try again later", retry_after_s=5)
        loads = (self._change_adapter(link, LoraLoad(name, path)) for link in self._links)
        faults = []
        for result in await asyncio.gather(*loads, return_exceptions=True):  # all have answered by then
            if isinstance(result, BaseException):
                raise result
            faults.append(result)
        return next(filter(None, faults), "")

    async def unload_adapter(self, name: str) -> None:
        """Until no instance holds it. One that is not there, or dies over it, comes back without it."""
        unloads = (self._change_adapter(link, LoraUnload(name)) for link in self._links if link.serving)
        for result in await asyncio.gather(*unloads, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, ServerError):
                raise result

    async def _change_adapter(self, link: InstanceLink, command: LoraLoad | LoraUnload) -> str:
        wait: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if not link.send(command):
            raise ServiceUnavailable("a model instance is not there; try again later", retry_after_s=5)
        link.adapter_waits[command.name] = wait
        return await wait

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
        counts, ids = part.progress()
        ends, request_id = link.ends, next(self._ids)
        if ends is None:
            return False
        pieces = layout.prompt_pieces(ends.prompts.slot_bytes, ids)
        if len(pieces) > ends.prompts.slots:
            part.flight.fail(EngineFailed(_DIED))  # too long to be taken up again
            return True
        for piece in pieces:
            while (slot := ends.prompts.reserve()) is None:  # the leader drains the ring between steps
                await asyncio.sleep(_RING_FULL_S)
                if link.ends is not ends:
                    return False
            layout.write_prompt(slot, request_id, piece)
            ends.prompts.commit()
        submit = Submit(request_id, len(part.prompt), part.priority, counts, part.cache_salt, part.sampling)
        if not ends.commands.send(submit):
            link.serving = False  # its leader is gone; the parent is about to say so
            return False
        part.request_id, part.link = request_id, link
        self._parts[request_id] = part
        return True

    def close(self, flight: Flight) -> None:
        """The reader is done with this flight; aborts what of it still runs in the engine."""
        flight.cancel()  # what waits for an instance is not sent any more
        for part in flight.parts:
            self._close_part(part)

    def _close_part(self, part: Part) -> None:
        link, request_id = part.link, part.request_id
        if self._forget(part) and link is not None:
            link.send(Abort(request_id, branch=-1))

    def end_branch(self, flight: Flight, branch: int) -> None:
        """No further tokens of this branch are wanted."""
        part = flight.parts[branch // flight.branches]
        branch -= part.first
        if branch in part.ended:
            return
        part.ended.add(branch)
        if part.all_ended:
            self._close_part(part)
        elif part.link is not None:
            part.link.send(Abort(part.request_id, branch))

    def _forget(self, part: Part) -> bool:
        """Take it out of its instance; whether it was in one."""
        if part.link is None:
            return False
        del self._parts[part.request_id]
        part.leave_place()
        part.link = None
        return True

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
            if ends is None or not self._read_record(link, ends):
                return
            if not ends.tokens.num_at_hand:
                return  # what has been filled meanwhile wakes us again: looking for it costs a system call
        # prompts with log-probabilities come in hundreds of records: others want their turn
        asyncio.get_running_loop().call_soon(self._guarded, self._on_tokens, link)

    def _read_record(self, link: InstanceLink, ends: LinkEnds) -> bool:
        """Hand the rows of the oldest record out; False when there is none."""
        slot = ends.tokens.take()
        if slot is None:
            return False
        batch_size, rows = layout.read_tokens(slot)
        ends.tokens.release()
        now = self.last_token_at = time.monotonic()
        for row in rows:
            part = self._parts.get(row.request_id)
            if part is None or row.branch in part.ended:
                continue  # aborted; the step was already under way
            flight = part.flight
            if row.rank:
                part.prompt_rows.append(PromptRow(row.token, row.logprob, row.rank, row.top))
                continue
            if (place := part.place) is not None and place.owed_tokens:
                place.note_begun()
            if row.preemptions != part.preemptions:
                flight.note_preemptions(part, row.preemptions, row.queue_wait_us)
            if row.cached_tokens:
                part.cached_tokens = row.cached_tokens
            if row.finish:
                part.ended.add(row.branch)
                if part.all_ended:
                    self._forget(part)
                elif row.error:
                    self._close_part(part)  # nobody waits for its other branches any more
            if row.error:
                cls = _ERRORS[row.error]
                flight.fail(cls(_REFUSALS.get(cls, "the engine ended this request")))
                continue
            part.outputs[row.branch].append(row.token)
            flight.push(
                Token(
                    part.first + row.branch,
                    row.token,
                    _FINISH_CODES[row.finish],
                    batch_size,
                    row.queue_wait_us,
                    now,
                    row.logprob,
                    row.top,
                )
            )
        return True

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
                wait = link.adapter_waits.pop(message.name, None)
                if wait is not None and not wait.done():
                    wait.set_result(message.error)
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
