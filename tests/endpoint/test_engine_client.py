"""Requests of several prompts over real rings and channels: who gets which rows, and what failures leave."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path

import pytest
import zmq

from endpoint.engine_client import EngineClient
from endpoint.flights import Flight, Token
from endpoint.instance_choice import InstanceChoice
from engine.errors import EngineFailed, GenerationRefused, ServerError, ServiceUnavailable
from engine.outcome import FinishCode, Outcome
from engine.sampling_params import SamplingParams
from engine.wire import layout, sizes
from engine.wire.channel import Channel
from engine.wire.links import InstanceWire
from engine.wire.messages import ENDED, Abort, EngineReady, LoraDone, LoraLoad, Message, Submit
from engine.wire.ring import RingReader, RingWriter, create_ring

SLOTS = 3
SLOT_TOKENS = 64
BLOCK = 16
HALF_BLOCKS = 7


class Engine:
    """The far end of one instance."""

    def __init__(
        self, wire: InstanceWire, context: zmq.Context[zmq.Socket[bytes]], generation: int = 0
    ) -> None:
        self.instance = wire.instance
        self.commands = Channel(context, zmq.PULL, wire.command_address(generation), bind=True)
        self.events = Channel(context, zmq.PUSH, wire.event_address(generation))
        self.prompts = RingReader(wire.prompt_ring, generation)
        self.tokens = RingWriter(wire.token_ring, generation)
        self.seen: dict[int, list[int]] = {}  # request -> its prompt
        self.outputs: dict[int, list[list[int] | None]] = {}  # request -> what its branches have already
        self.aborted: list[tuple[int, int]] = []
        self.loads: list[str] = []  # adapters

    def greet(self) -> None:
        assert self.events.wait_connected(5.0)
        self.events.send(EngineReady(self.instance, 100, 64, 128, 10, "cpu", "float32"))

    def die(self) -> None:
        self.commands.close()
        self.events.close()

    def receive(self) -> None:
        """Read what has come; the ring is emptied as far as messages say."""
        for message in self.commands.receive():
            self._take(message)

    def _take(self, message: Message) -> None:
        if isinstance(message, Submit):
            wanted = message.num_prompt_tokens + sum(max(0, count) for count in message.outputs)
            ids: list[int] = []
            while len(ids) < wanted:
                slot = self.prompts.take()
                assert slot is not None
                request_id, piece = layout.read_prompt(slot)
                self.prompts.release()
                assert request_id == message.request_id
                ids += piece.tolist()
            self.seen[message.request_id] = ids[: message.num_prompt_tokens]
            start = message.num_prompt_tokens
            outputs: list[list[int] | None] = []
            for count in message.outputs:
                outputs.append(None if count == ENDED else ids[start : start + count])
                start += max(0, count)
            self.outputs[message.request_id] = outputs
        elif isinstance(message, Abort):
            self.aborted.append((message.request_id, message.branch))
        elif isinstance(message, LoraLoad):
            self.loads.append(message.name)
            self.events.send(LoraDone(message.name, ""))

    def say(self, *outcomes: Outcome) -> None:
        slot = self.tokens.reserve()
        assert slot is not None
        layout.write_tokens(slot, 1, len(outcomes), 0, outcomes)
        self.tokens.commit()


class Parent:
    """What the daemon does about the death of an instance."""

    def __init__(
        self, wires: list[InstanceWire], context: zmq.Context[zmq.Socket[bytes]], client: EngineClient
    ) -> None:
        self._wires, self._context, self._client = wires, context, client
        # kept for as long as their sockets are open
        self._engines: list[Engine] = []
        self._channels: list[Channel] = []

    def kill(self, engine: Engine, *, final: bool = False) -> int:
        engine.die()
        return self._client.close_instance(engine.instance, final=final)

    def replace_half(self, instance: int, generation: int) -> None:
        """By one that greets but never listens."""
        self._client.open_instance(instance, generation)
        events = Channel(self._context, zmq.PUSH, self._wires[instance].event_address(generation))
        self._channels.append(events)
        assert events.wait_connected(5.0)
        events.send(EngineReady(instance, 100, 64, 128, HALF_BLOCKS, "cpu", "float32"))

    async def replace(self, instance: int, generation: int) -> Engine:
        wire = self._wires[instance]
        wire.prompt_ring.reset()
        wire.token_ring.reset()
        self._client.open_instance(instance, generation)
        engine = Engine(wire, self._context, generation)
        self._engines.append(engine)
        engine.greet()
        return engine


def run(
    folder: Path,
    work: Callable[..., Awaitable[None]],
    instances: int = 1,
    wanted: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda has: has,
    prefix_cache: bool = False,
) -> None:
    """`work(client, engines)`, or with a third parameter `parent`. `wanted`: of the adapters."""

    def wire(number: int) -> InstanceWire:
        name = f"mindie_test_{os.getpid()}_{random.getrandbits(64):x}"
        return InstanceWire(
            number,
            str(folder),
            create_ring(f"{name}p", SLOTS, sizes.prompt_slot_bytes(SLOT_TOKENS)),
            create_ring(f"{name}t", SLOTS, sizes.TOKEN_SLOT_BYTES),
        )

    async def all_of_it() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        wires = [wire(number) for number in range(instances)]
        choice = InstanceChoice(BLOCK, 200, prefix_cache=prefix_cache)
        client = EngineClient(wires, context, wanted, lambda *_: None, choice)
        engines = [Engine(wire, context) for wire in wires]
        for number in range(instances):
            client.open_instance(number, 0)
        more = (Parent(wires, context, client),) if len(signature(work).parameters) == 3 else ()
        try:
            for engine in engines:
                engine.greet()
            await client.wait_ready()
            await work(client, engines, *more)
            assert not client.failure.done()
        finally:
            context.destroy(linger=0)  # while the sockets are still referred to: else each one warns

    asyncio.run(asyncio.wait_for(all_of_it(), 30))


async def submit(client: EngineClient, prompts: Sequence[Sequence[int]], branches: int = 1) -> Flight:
    sampling = SamplingParams(8, branches=branches)
    parts = [(ids, sampling) for ids in prompts]
    return await client.submit(parts, 5, arrival=0.0, token_limit_s=60.0)


async def until(engine: Engine, condition: Callable[[], bool]) -> None:
    while not condition():
        engine.receive()
        await asyncio.sleep(0.001)


def token(request_id: int, branch: int, value: int, finish: FinishCode = FinishCode.NONE) -> Outcome:
    return Outcome(request_id, branch, value, finish, None, 0)


def told(read: Token | None) -> tuple[int, int]:
    assert read is not None
    return read.branch, read.token_id


def test_rows_of_each_part_become_branches_of_the_whole(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        (engine,) = engines
        flight = await submit(client, [[1], [2, 3], [4]], branches=2)
        await until(engine, lambda: len(engine.seen) == 3)
        first, second, third = engine.seen
        assert list(engine.seen.values()) == [[1], [2, 3], [4]]
        engine.say(token(third, 1, 51), token(first, 0, 10), token(second, 1, 31), token(first, 1, 11))
        read = [told(await flight.next()) for _ in range(4)]
        assert read == [(5, 51), (0, 10), (3, 31), (1, 11)]
        client.end_branch(flight, 3)  # a stop string
        await until(engine, lambda: bool(engine.aborted))
        assert engine.aborted == [(second, 1)]
        client.end_branch(flight, 2)  # now all of the second part
        await until(engine, lambda: len(engine.aborted) == 2)
        assert engine.aborted[1] == (second, -1)
        engine.say(token(second, 0, 99), token(first, 0, 12, FinishCode.EOS))
        assert told(await flight.next()) == (0, 12)  # not what came after the abort
        client.close(flight)
        await until(engine, lambda: len(engine.aborted) == 4)
        assert sorted(engine.aborted[2:]) == [(first, -1), (third, -1)]

    run(tmp_path, work)


def test_parts_are_spread_over_instances(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        flight = await submit(client, [[1], [2], [3], [4]])
        for engine in engines:
            await until(engine, lambda engine=engine: len(engine.seen) == 2)  # type: ignore[misc]
        client.close(flight)
        for engine in engines:
            await until(engine, lambda engine=engine: len(engine.aborted) == 2)  # type: ignore[misc]
            assert {request for request, _ in engine.aborted} == set(engine.seen)

    run(tmp_path, work, instances=2)


def test_a_prompt_goes_where_its_beginning_is_cached_until_that_instance_is_replaced(tmp_path: Path) -> None:
    beginnings = {text: [text] * (2 * BLOCK) for text in range(2)}

    async def ask(client: EngineClient, engines: list[Engine], text: int, end: int) -> int:
        """The instance that answered."""
        prompt = [*beginnings[text], end]
        flight = await submit(client, [prompt])
        while not (found := [e for e in engines if prompt in e.seen.values()]):
            for engine in engines:
                engine.receive()
            await asyncio.sleep(0.001)
        (engine,) = found
        request_id = next(number for number, ids in engine.seen.items() if ids == prompt)
        engine.say(token(request_id, 0, 7, FinishCode.EOS))
        assert told(await flight.next()) == (0, 7)
        client.close(flight)
        return engine.instance

    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        asked = [(0, 50), (1, 51), (1, 52), (0, 53), (0, 54), (1, 55)]
        homes = [await ask(client, engines, text, end) for text, end in asked]
        assert homes == [0, 1, 1, 0, 0, 1]  # the second text takes its turn, the others follow
        parent.kill(engines[1])
        assert await ask(client, engines[:1], 1, 56) == 0
        engines[1] = await parent.replace(1, 1)
        await until(engines[1], lambda: all(link.serving for link in client._links))
        assert await ask(client, engines, 1, 57) == 0  # its old home has forgotten everything

    run(tmp_path, work, instances=2, prefix_cache=True)


def test_a_submission_that_is_cancelled_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    """The ring is full, so the later parts wait; then the client goes."""

    async def work(client: EngineClient, engines: list[Engine]) -> None:
        emptied = engines[0]
        task = asyncio.create_task(submit(client, [[n] for n in range(20)]))
        # each instance gets every second part: the next one has no room on the other's ring
        await until(emptied, lambda: len(emptied.seen) > SLOTS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(engines[1], lambda: len(engines[1].aborted) == len(engines[1].seen) == SLOTS)
        await until(emptied, lambda: len(emptied.aborted) == len(emptied.seen))
        # and nothing is counted as running: the next ones go where there is an instance, one each
        taken = len(emptied.seen)
        flight = await submit(client, [[1], [2]])
        await until(emptied, lambda: len(emptied.seen) == taken + 1)
        client.close(flight)

    run(tmp_path, work, instances=2)


def test_F01_what_an_instance_had_goes_on_in_another(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        flights = [await submit(client, [[n, n]]) for n in range(4)]
        for engine in engines:
            await until(engine, lambda engine=engine: len(engine.seen) == 2)  # type: ignore[misc]
        first, second = engines
        begun, fresh = second.seen
        second.say(token(begun, 0, 70), token(fresh, 0, 90))
        second.say(token(begun, 0, 71))  # told, but not read yet when it dies
        parent.kill(second)
        await until(first, lambda: len(first.seen) == 4)
        resumed = {first.seen[r][0]: (r, outputs) for r, outputs in first.outputs.items() if outputs}
        number = second.seen[begun][0]
        assert resumed[number][1] == [[70, 71]] and resumed[second.seen[fresh][0]][1] == [[90]]
        first.say(token(resumed[number][0], 0, 72, FinishCode.EOS))
        read = [told(await flights[number].next()) for _ in range(3)]
        assert read == [(0, 70), (0, 71), (0, 72)]
        for flight in flights:
            client.close(flight)

    run(tmp_path, work, instances=2)


def test_F01_the_only_instance_is_waited_for(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines
        flight = await submit(client, [[1, 2]], branches=2)
        await until(engine, lambda: len(engine.seen) == 1)
        (request_id,) = engine.seen
        engine.say(token(request_id, 0, 10), token(request_id, 1, 20, FinishCode.EOS))
        engine.say(token(request_id, 0, 11))
        assert parent.kill(engine) == 0
        assert not client.available and client.recovering
        newcomer = await submit(client, [[3]])  # it had been admitted; now it waits as well
        gone = await submit(client, [[4]])
        client.close(gone)
        engine = await parent.replace(0, 1)
        await until(engine, lambda: len(engine.seen) == 2)
        assert list(engine.seen.values()) == [[1, 2], [3]]
        resumed, _ = engine.seen
        assert engine.outputs[resumed] == [[10, 11], None]  # branch 1 has ended
        engine.say(token(resumed, 0, 12, FinishCode.LENGTH))
        assert [told(await flight.next()) for _ in range(4)] == [(0, 10), (1, 20), (0, 11), (0, 12)]
        client.close(flight)
        client.close(newcomer)

    run(tmp_path, work)


def test_F01_a_prompt_whose_answers_have_all_ended_is_not_sent_again(tmp_path: Path) -> None:
    """A stop string may be found while the request waits for an instance; its other prompts go on."""

    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines
        flight = await submit(client, [[1], [2]])
        await until(engine, lambda: len(engine.seen) == 2)
        engine.say(*(token(request_id, 0, 10) for request_id in engine.seen))
        parent.kill(engine)
        client.end_branch(flight, 0)
        engine = await parent.replace(0, 1)
        last = await submit(client, [[3]])
        await until(engine, lambda: [3] in engine.seen.values())
        assert list(engine.seen.values()) == [[2], [3]]
        client.close(flight)
        client.close(last)

    run(tmp_path, work)


def test_F01_a_leader_that_dies_before_it_is_reached_leaves_its_successor_alone(tmp_path: Path) -> None:
    adapters: dict[str, str] = {}

    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines
        adapters["chat"] = "/adapters/chat"  # an engine that comes up has to load it
        parent.kill(engine)
        parent.replace_half(0, 1)
        while client.limits().num_blocks != HALF_BLOCKS:  # it has greeted, and cannot be reached
            await asyncio.sleep(0.001)
        client.close_instance(0, final=False)
        engine = await parent.replace(0, 2)
        await until(engine, lambda: client.available)
        await asyncio.sleep(0.02)  # nothing else is on its way
        engine.receive()
        assert engine.loads == ["chat"]

    run(tmp_path, work, wanted=lambda has: adapters)


def test_F01_what_is_longer_than_a_slot_goes_in_pieces(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines
        longest, too_long = SLOTS * SLOT_TOKENS - 1, SLOTS * SLOT_TOKENS
        flights = [await submit(client, [[number]]) for number in range(2)]
        await until(engine, lambda: len(engine.seen) == 2)
        for request_id, count in zip(engine.seen, (longest, too_long), strict=True):
            engine.say(*(token(request_id, 0, value) for value in range(count)))
        parent.kill(engine)
        engine = await parent.replace(0, 1)
        await until(engine, lambda: len(engine.seen) == 1)
        (outputs,) = engine.outputs.values()
        assert outputs == [list(range(longest))]
        for value in range(too_long):  # nothing is lost before the error
            assert told(await flights[1].next()) == (0, value)
        with pytest.raises(EngineFailed):
            await flights[1].next()
        for flight in flights:
            client.close(flight)

    run(tmp_path, work)


def test_F03_a_request_that_was_in_two_crashes_is_not_tried_again(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines
        poison = await submit(client, [[1]])
        await until(engine, lambda: len(engine.seen) == 1)
        parent.kill(engine)
        engine = await parent.replace(0, 1)
        bystander = await submit(client, [[2]])
        await until(engine, lambda: len(engine.seen) == 2)
        parent.kill(engine)
        with pytest.raises(EngineFailed):
            await poison.next()
        engine = await parent.replace(0, 2)
        await until(engine, lambda: len(engine.seen) == 1)
        assert list(engine.seen.values()) == [[2]]
        client.close(poison)
        client.close(bystander)

    run(tmp_path, work)


def test_an_instance_that_does_not_come_back_ends_its_requests(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines
        flight = await submit(client, [[1]])
        await until(engine, lambda: len(engine.seen) == 1)
        parent.kill(engine, final=True)
        with pytest.raises(EngineFailed):
            await flight.next()
        with pytest.raises(ServiceUnavailable):
            await submit(client, [[2]])
        client.close(flight)

    run(tmp_path, work)


def test_scores_of_a_prompt_that_was_half_told_are_asked_for_again(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine], parent: Parent) -> None:
        (engine,) = engines

        def score(request_id: int, value: int) -> Outcome:
            return Outcome(request_id, 0, value, FinishCode.NONE, None, 0, -0.5, [(9, -0.25)], 3)

        flight = await submit(client, [[1, 2, 3]])
        await until(engine, lambda: len(engine.seen) == 1)
        engine.say(score(next(iter(engine.seen)), 2))
        parent.kill(engine)
        engine = await parent.replace(0, 1)
        await until(engine, lambda: len(engine.seen) == 1)
        (request_id,) = engine.seen
        engine.say(score(request_id, 2), score(request_id, 3), token(request_id, 0, 7))
        assert told(await flight.next()) == (0, 7)
        assert [row.token_id for row in flight.parts[0].prompt_rows] == [2, 3]
        client.close(flight)

    run(tmp_path, work)


def test_a_token_does_not_come_before_its_request_was_submitted(tmp_path: Path) -> None:
    """The first of many prompts is answered while the last ones still wait for room on the ring."""

    async def work(client: EngineClient, engines: list[Engine]) -> None:
        (engine,) = engines
        task = asyncio.create_task(submit(client, [[n] for n in range(4 * SLOTS)]))
        await until(engine, lambda: bool(engine.seen))
        engine.say(token(min(engine.seen), 0, 7))
        while not client.last_token_at:
            await asyncio.sleep(0.001)
        await until(engine, task.done)
        flight = await task
        first = await flight.next()
        assert first is not None and flight.submitted <= first.at <= flight.last_token
        client.close(flight)

    run(tmp_path, work)


def test_scores_of_prompts_are_kept_with_their_part(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        (engine,) = engines
        flight = await submit(client, [[1, 2, 3], [4, 5]])
        await until(engine, lambda: len(engine.seen) == 2)
        first, second = engine.seen

        def score(request_id: int, value: int, rank: int) -> Outcome:
            return Outcome(request_id, 0, value, FinishCode.NONE, None, 0, -0.5, [(9, -0.25)], rank)

        engine.say(score(second, 5, 1), score(first, 2, 4), score(first, 3, 2))
        engine.say(token(first, 0, 7), token(second, 0, 8))
        assert [told(await flight.next()) for _ in range(2)] == [(0, 7), (1, 8)]
        rows = [[(row.token_id, row.rank) for row in part.prompt_rows] for part in flight.parts]
        assert rows == [[(2, 4), (3, 2)], [(5, 1)]]
        assert flight.parts[1].prompt_rows[0].others == [(9, -0.25)]
        client.close(flight)

    run(tmp_path, work)


@pytest.mark.parametrize("first", ["cancel", "fail"])
def test_what_has_arrived_comes_before_the_end(tmp_path: Path, first: str) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        (engine,) = engines
        flight = await submit(client, [[1]])
        await until(engine, lambda: len(engine.seen) == 1)
        (request_id,) = engine.seen
        engine.say(token(request_id, 0, 7))
        assert told(await flight.next()) == (0, 7)
        waiting = asyncio.create_task(flight.next())
        await asyncio.sleep(0)
        if first == "cancel":
            flight.cancel()
            assert await waiting is None and await flight.next() is None
        else:
            flight.fail(GenerationRefused("no"))
            with pytest.raises(GenerationRefused):
                await waiting
        client.close(flight)

    run(tmp_path, work)


def test_an_error_of_one_part_ends_the_request(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        (engine,) = engines
        flight = await submit(client, [[1], [2]])
        await until(engine, lambda: len(engine.seen) == 2)
        first, second = engine.seen
        engine.say(token(first, 0, 7), Outcome(second, 0, -1, FinishCode.ERROR, GenerationRefused, 0))
        assert told(await flight.next()) == (0, 7)
        with pytest.raises(ServerError, match="cache cannot hold"):
            await flight.next()
        client.close(flight)
        await until(engine, lambda: bool(engine.aborted))
        assert engine.aborted == [(first, -1)]

    run(tmp_path, work)
