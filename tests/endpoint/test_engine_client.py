"""Requests of several prompts over real rings and channels: who gets which rows, and what failures leave."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import zmq

from endpoint.engine_client import EngineClient, Flight, Token
from engine.errors import EngineFailed, GenerationRefused, ServerError, ServiceUnavailable
from engine.outcome import FinishCode, Outcome
from engine.sampling_params import SamplingParams
from engine.wire import layout, sizes
from engine.wire.channel import Channel
from engine.wire.links import InstanceWire
from engine.wire.messages import Abort, EngineReady, Message, Submit
from engine.wire.ring import RingReader, RingWriter, create_ring

SLOTS = 3


class Engine:
    """The far end of one instance."""

    def __init__(self, wire: InstanceWire, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.commands = Channel(context, zmq.PULL, wire.command_address, bind=True)
        self.prompts = RingReader(wire.prompt_ring)
        self.tokens = RingWriter(wire.token_ring)
        self.seen: dict[int, list[int]] = {}  # request -> its prompt
        self.aborted: list[tuple[int, int]] = []

    def receive(self) -> None:
        """Read what has come; the ring is emptied as far as messages say."""
        for message in self.commands.receive():
            self._take(message)

    def _take(self, message: Message) -> None:
        if isinstance(message, Submit):
            slot = self.prompts.take()
            assert slot is not None
            request_id, ids = layout.read_prompt(slot)
            self.prompts.release()
            assert request_id == message.request_id
            self.seen[request_id] = ids.tolist()
        elif isinstance(message, Abort):
            self.aborted.append((message.request_id, message.branch))

    def say(self, *outcomes: Outcome) -> None:
        slot = self.tokens.reserve()
        assert slot is not None
        layout.write_tokens(slot, 1, len(outcomes), 0, outcomes)
        self.tokens.commit()


def run(
    folder: Path,
    work: Callable[[EngineClient, list[Engine]], Awaitable[None]],
    instances: int = 1,
) -> None:
    def wire(number: int) -> InstanceWire:
        name = f"mindie_test_{os.getpid()}_{random.getrandbits(64):x}"
        return InstanceWire(
            number,
            f"ipc://{folder}/commands{number}",
            f"ipc://{folder}/events{number}",
            create_ring(f"{name}p", SLOTS, sizes.prompt_slot_bytes(64)),
            create_ring(f"{name}t", SLOTS, sizes.TOKEN_SLOT_BYTES),
        )

    async def all_of_it() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        wires = [wire(number) for number in range(instances)]
        client = EngineClient(wires, context)
        engines = [Engine(wire, context) for wire in wires]
        events = [Channel(context, zmq.PUSH, each.event_address) for each in wires]
        try:
            for number, channel in enumerate(events):
                assert channel.wait_connected(5.0)
                channel.send(EngineReady(number, 100, 64, 128, 10, "cpu", "float32"))
            await client.wait_ready()
            await work(client, engines)
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
        client.instance_down(1, "killed")
        with pytest.raises(EngineFailed):
            await flight.next()
        client.close(flight)
        await until(engines[0], lambda: len(engines[0].aborted) == 2)
        assert {request for request, _ in engines[0].aborted} == set(engines[0].seen)

    run(tmp_path, work, instances=2)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_submission_that_fails_half_way_leaves_nothing_behind(tmp_path: Path, cancelled: bool) -> None:
    """The ring is full, so the later parts wait; then the instance dies, or the client goes."""

    async def work(client: EngineClient, engines: list[Engine]) -> None:
        emptied = engines[0]
        task = asyncio.create_task(submit(client, [[n] for n in range(20)]))
        # each instance gets every second part: the next one has no room on the other's ring
        await until(emptied, lambda: len(emptied.seen) > SLOTS)
        if cancelled:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(engines[1], lambda: len(engines[1].aborted) == len(engines[1].seen) == SLOTS)
        else:
            client.instance_down(1, "killed")
            with pytest.raises(ServiceUnavailable):
                await task
        await until(emptied, lambda: len(emptied.aborted) == len(emptied.seen))
        # and nothing is counted as running: the next ones go where there is an instance, one each
        taken = len(emptied.seen)
        flight = await submit(client, [[1], [2]])
        await until(emptied, lambda: len(emptied.seen) == taken + (1 if cancelled else 2))
        client.close(flight)

    run(tmp_path, work, instances=2)


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
