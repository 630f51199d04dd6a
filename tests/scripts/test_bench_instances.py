"""scripts/bench_instances.py: the loads are what they say; its daemon is that of every benchmark."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_instances")

REQUESTS, CLIENTS = 24, 4


def asked(load: str) -> list[list[int]]:
    """The prompts of a load in the order they were sent, and never more at once than there are clients."""
    prompts: list[list[int]] = []
    under_way = 0

    async def ask(prompt: Sequence[int]) -> None:
        nonlocal under_way
        under_way += 1
        assert under_way <= CLIENTS
        prompts.append(list(prompt))
        await asyncio.sleep(0)
        under_way -= 1

    loads = bench.Loads(argparse.Namespace(requests=REQUESTS, clients=CLIENTS, seed=0), range(100, 1000))
    asyncio.run(getattr(loads, load)(ask))
    assert len(prompts) == REQUESTS
    return prompts


def test_one_in_eight_is_long() -> None:
    assert sorted(map(len, asked("skewed"))) == [32] * 21 + [1600] * 3


def test_each_turn_goes_on_from_the_one_before_in_an_order_of_its_own() -> None:
    prompts = asked("conversations")
    talks: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt in prompts:
        talks.setdefault(tuple(prompt[:960]), []).append(prompt)
    assert [len(turns) for turns in talks.values()] == [4] * (REQUESTS // 4)
    for turns in talks.values():
        for before, after in pairwise(turns):
            assert after[: len(before)] == before and len(after) == len(before) + 32
    orders = [[prompt[:960] for prompt in prompts[n : n + 6]] for n in range(0, REQUESTS, 6)]
    assert all(before != after for before, after in pairwise(orders))


def test_all_begin_alike_and_end_differently() -> None:
    prompts = asked("one_beginning")
    assert len({tuple(prompt[:960]) for prompt in prompts}) == 1
    assert len({tuple(prompt[960:]) for prompt in prompts}) == REQUESTS


def test_the_imbalance_of_equals_is_one() -> None:
    assert bench.Result([2.0, 2.0, 2.0], 1, 0).imbalance == 1
    assert bench.Result([3.0, 0.0], 1, 0).imbalance == 2
