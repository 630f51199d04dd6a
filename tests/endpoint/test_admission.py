"""Admission: nobody waits for a place that is free, and who has gone takes no place in the line."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from endpoint.admission import Admission
from engine.errors import ServiceUnavailable


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_a_place_freed_in_the_same_turn_is_taken() -> None:
    async def work() -> None:
        admission = Admission(1)
        await admission.enter()
        second = asyncio.create_task(admission.enter())
        admission.leave()  # before the second task has run at all
        await asyncio.wait_for(second, 1)

    run(work())


def test_who_hangs_up_in_the_line_leaves_no_hole() -> None:
    async def work() -> None:
        admission = Admission(1)
        await admission.enter()
        gone = [asyncio.create_task(admission.enter()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ServiceUnavailable):
            await admission.enter()
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        waiting = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        admission.leave()
        await asyncio.wait_for(waiting, 1)

    run(work())


def test_a_place_handed_to_a_client_that_is_just_leaving_is_passed_on() -> None:
    async def work() -> None:
        admission = Admission(1)
        await admission.enter()
        leaving, next_one = asyncio.create_task(admission.enter()), asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        admission.leave()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.wait_for(next_one, 1)

    run(work())


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_clients_keeps_the_limit_and_ends(seed: int) -> None:
    async def work() -> None:
        rng = random.Random(seed)
        admission = Admission(3)
        inside = most = refused = 0

        async def client() -> None:
            nonlocal inside, most, refused
            try:
                await admission.enter()
            except ServiceUnavailable:
                refused += 1
                return
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(rng.random() * 0.01)
            finally:
                inside -= 1
                admission.leave()

        tasks = []
        for _ in range(100):
            tasks.append(asyncio.create_task(client()))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.004)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 3 and inside == 0
        for _ in range(3):
            await asyncio.wait_for(admission.enter(), 1)

    run(work())
