"""Which instance a prompt goes to: balance under skewed load, beginnings that are cached, no room."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import pytest
import zmq

from endpoint.flights import Flight, Part
from endpoint.instance_choice import ROW_TOKENS, InstanceChoice
from endpoint.instance_link import InstanceLink
from engine.sampling_params import SamplingParams
from engine.wire.links import InstanceWire
from engine.wire.messages import EngineReady, EngineStats
from engine.wire.ring import create_ring

BLOCK = 16
MAX_ROWS = 64
NUM_BLOCKS = 4096
_NAMES = count()

Context = zmq.Context[zmq.Socket[bytes]]


class Fleet:
    """Instances nobody computes in: what is given to them stays until it is taken away."""

    def __init__(self, context: Context, instances: int, num_blocks: int = NUM_BLOCKS) -> None:
        self.choice = InstanceChoice(BLOCK, MAX_ROWS, prefix_cache=True)
        self.links = []
        for number in range(instances):
            ring = create_ring(f"mindie_test_{os.getpid()}_{next(_NAMES)}", 1, 64)
            link = InstanceLink(InstanceWire(number, "", ring, ring), context)
            link.ready = EngineReady(number, 1000, 4096, 8192, num_blocks, "cpu", "float32")
            link.serving = True
            self.links.append(link)

    def send(
        self,
        prompt: Sequence[int],
        *,
        salt: bytes = b"",
        branches: int = 1,
        outputs: Sequence[int] = (),
        **sampling: object,
    ) -> tuple[int, Part]:
        params = SamplingParams(8, branches=branches, **sampling)  # type: ignore[arg-type]
        flight = Flight(branches, 0.0, 0.0, 0.0, 60.0)
        told = [list(outputs) for _ in range(branches)]
        part = Part(flight, 0, np.asarray(prompt, np.int32), params, 5, told, salt)
        chosen = self.choice.choose(self.links, part)
        assert chosen is not None
        link, part.place = chosen
        return link.instance, part

    def costs(self) -> list[int]:
        burdens = [link.burden for link in self.links]
        return [burden.owed_tokens + burden.rows * ROW_TOKENS for burden in burdens]

    def tell_free(self, instance: int, free_blocks: int) -> None:
        self.links[instance].stats = EngineStats(instance, 0, 0, 0, 0, free_blocks, 0, 0, 0, 0, 0, 0)


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


def fresh(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("instances", [2, 4])
def test_long_and_short_prompts_leave_no_instance_behind(context: Context, seed: int, instances: int) -> None:
    """Nobody is further ahead than by the one request that put it there; one in eight is 50 times as long."""
    draw, fleet = random.Random(seed), Fleet(context, instances)
    longest = 1600
    for number in range(instances * 40):
        fleet.send(fresh(draw, longest if number % 8 == 0 else 32))
        assert max(fleet.costs()) - min(fleet.costs()) <= longest + ROW_TOKENS


def test_a_long_prompt_is_a_burden_only_until_its_first_token(context: Context) -> None:
    draw, fleet = random.Random(0), Fleet(context, 2)
    home, part = fleet.send(fresh(draw, 1600))
    homes = Counter(fleet.send(fresh(draw, 16))[0] for _ in range(4))
    assert homes == {1 - home: 4}
    assert part.place is not None
    part.place.note_begun()
    homes = Counter(fleet.send(fresh(draw, 16))[0] for _ in range(3))
    assert homes == {home: 3}


def test_everything_that_was_given_is_given_back(context: Context) -> None:
    draw, fleet = random.Random(1), Fleet(context, 3)
    parts = [fleet.send(fresh(draw, draw.randrange(1, 200)), branches=1 + n % 3)[1] for n in range(60)]
    draw.shuffle(parts)
    for number, part in enumerate(parts):
        assert part.place is not None
        if number % 2:
            part.place.note_begun()
            part.place.note_begun()
        part.leave_place()
        part.leave_place()
    assert fleet.costs() == [0, 0, 0]


def test_texts_that_begin_alike_stay_together(context: Context) -> None:
    """Conversations of 3 instances, one turn at a time: each is computed from scratch once."""
    draw, fleet = random.Random(2), Fleet(context, 3)
    talks = [fresh(draw, 10 * BLOCK) for _ in range(9)]
    homes: dict[int, set[int]] = {}
    for _ in range(4):
        for number in draw.sample(range(9), 9):
            home, part = fleet.send(talks[number])
            homes.setdefault(number, set()).add(home)
            part.leave_place()
            talks[number] += fresh(draw, 40)
    assert all(len(where) == 1 for where in homes.values())
    # equals took turns: nobody has all of them
    assert Counter(home for (home,) in homes.values()) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("instances", [2, 4])
def test_a_beginning_that_everybody_has_is_spread_when_that_is_cheaper(
    context: Context, instances: int
) -> None:
    draw, fleet = random.Random(3), Fleet(context, instances)
    shared = fresh(draw, 64 * BLOCK)
    rows: Counter[int] = Counter()
    for _ in range(instances * 24):
        home, part = fleet.send([*shared, *fresh(draw, 8)])
        assert part.place is not None
        part.place.note_begun()
        rows[home] += 1
        behind = max(rows.values()) - min(rows[n] for n in range(instances))
        assert behind <= len(shared) // ROW_TOKENS + 2
    assert max(rows.values()) - min(rows.values()) <= 1  # once all have it, only the rows count


def test_what_may_not_share_a_cache_is_not_kept_together(context: Context) -> None:
    """The second prompt of each pair takes its turn elsewhere unless the first one's blocks serve it."""
    draw = random.Random(4)
    text = fresh(draw, 8 * BLOCK)

    def together(first: dict[str, object], second: dict[str, object]) -> bool:
        fleet = Fleet(context, 2)
        home, part = fleet.send([*text, 1], **first)  # type: ignore[arg-type]
        part.leave_place()
        return fleet.send([*text, 2], **second)[0] == home  # type: ignore[arg-type]

    assert together({}, {})
    assert together({"salt": b"alice"}, {"salt": b"alice"})
    assert not together({"salt": b"alice"}, {"salt": b"bob"})
    assert not together({"reproducible": True}, {})
    assert not together({"lora": "chat"}, {"lora": "code"})


def test_the_last_token_and_half_blocks_are_computed_anyway(context: Context) -> None:
    fleet = Fleet(context, 2)
    text = list(range(4 * BLOCK))
    _, part = fleet.send(text)
    assert part.place is not None and part.place.owed_tokens == len(text)
    part.leave_place()
    for length, owed in ((4 * BLOCK, BLOCK), (4 * BLOCK - 5, BLOCK - 5), (3 * BLOCK + 1, 1)):
        _, part = fleet.send(text[:length])
        assert part.place is not None and part.place.owed_tokens == owed
        part.leave_place()


def test_a_full_instance_comes_last_whatever_it_has_cached(context: Context) -> None:
    draw, fleet = random.Random(5), Fleet(context, 2)
    text = fresh(draw, 20 * BLOCK)
    home, part = fleet.send(text)
    part.leave_place()
    assert fleet.send(text)[0] == home
    fleet.tell_free(home, free_blocks=1)
    assert fleet.send([*text, *fresh(draw, 2 * BLOCK)])[0] != home
    fleet.tell_free(home, free_blocks=NUM_BLOCKS)
    fleet.links[home].burden.rows = MAX_ROWS
    assert fleet.send(text)[0] != home


def test_a_request_that_resumes_owes_what_it_has_already_been_told(context: Context) -> None:
    fleet = Fleet(context, 2)
    _, part = fleet.send(range(5), outputs=range(40), branches=2)
    assert part.place is not None
    assert (part.place.owed_tokens, part.place.rows) == (85, 2)


def test_no_more_is_remembered_than_a_cache_holds(context: Context) -> None:
    draw, fleet = random.Random(6), Fleet(context, 1, num_blocks=12)
    fleet.links += Fleet(context, 1, num_blocks=12).links
    fleet.links[1].serving = False
    old, new = fresh(draw, 9 * BLOCK), fresh(draw, 9 * BLOCK)
    for text in (old, new):
        fleet.send(text)[1].leave_place()
    (_, of_new), (_, of_old) = fleet.send(new), fleet.send(old)
    assert of_new.place is not None and of_new.place.owed_tokens == BLOCK
    assert of_old.place is not None and of_old.place.owed_tokens == len(old)  # its first blocks went first


def test_without_an_instance_there_is_no_choice(context: Context) -> None:
    fleet = Fleet(context, 2)
    for link in fleet.links:
        link.serving = False
    flight = Flight(1, 0.0, 0.0, 0.0, 60.0)
    part = Part(flight, 0, np.arange(3, dtype=np.int32), SamplingParams(8), 5, [[]])
    assert fleet.choice.choose(fleet.links, part) is None
