"""Admission: nobody waits for a place that is free, who has gone takes none, keys take turns."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from endpoint.admission import KEY_QUEUED, KEY_TOKENS, LINE_FULL, WAITING_TOKENS, Admission, Place
from endpoint.api_keys import ApiKey
from engine.errors import QuotaExceeded, ServiceUnavailable
from engine.settings import ApiKeySettings


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def make_key(name: str, **limits: int) -> ApiKey:
    return ApiKey(ApiKeySettings(name, hashlib.sha256(name.encode()).digest(), **limits))


async def queued(admission: Admission, key: ApiKey | None = None) -> asyncio.Task[Place]:
    """A request that has had its turn to stand in line."""
    task = asyncio.create_task(admission.enter(key))
    await asyncio.sleep(0)
    return task


def test_a_place_freed_in_the_same_turn_is_taken() -> None:
    async def work() -> None:
        admission = Admission(1)
        place = await admission.enter()
        second = asyncio.create_task(admission.enter())
        place.leave()  # before the second task has run at all
        await asyncio.wait_for(second, 1)

    run(work())


def test_one_runs_two_wait_the_fourth_is_refused_at_once() -> None:
    async def work() -> None:
        admission = Admission(1)
        await admission.enter()
        waiting = [await queued(admission) for _ in range(2)]
        assert (admission.running, admission.waiting) == (1, 2)
        for refuse in (admission.enter, admission.check_room):
            with pytest.raises(ServiceUnavailable, match="maxLinkNum") as caught:
                await refuse()  # type: ignore[misc]
            assert caught.value.retry_after_s == 1, "nothing is known yet of how fast the line drains"
        assert admission.refused[LINE_FULL] == 2
        for task in waiting:
            task.cancel()

    run(work())


def test_who_hangs_up_in_the_line_leaves_no_hole() -> None:
    async def work() -> None:
        admission = Admission(1)
        place = await admission.enter()
        gone = [await queued(admission) for _ in range(2)]
        with pytest.raises(ServiceUnavailable):
            await admission.enter()
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        waiting = await queued(admission)
        place.leave()
        await asyncio.wait_for(waiting, 1)

    run(work())


def test_a_place_handed_to_a_client_that_is_just_leaving_is_passed_on() -> None:
    async def work() -> None:
        admission = Admission(1)
        place = await admission.enter()
        leaving, next_one = await queued(admission), await queued(admission)
        place.leave()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.wait_for(next_one, 1)

    run(work())


@pytest.mark.parametrize("seed", range(5))
def test_any_mix_of_clients_keeps_the_limit_and_ends(seed: int) -> None:
    async def work() -> None:
        rng = random.Random(seed)
        admission = Admission(3)
        keys = [None, make_key("a"), make_key("b", max_running=1), make_key("c", max_queued=2)]
        inside: dict[ApiKey | None, int] = dict.fromkeys(keys, 0)
        most = most_of_b = 0

        async def client(key: ApiKey | None) -> None:
            nonlocal most, most_of_b
            place = await admission.enter(key)
            inside[key] += 1
            most = max(most, sum(inside.values()))
            most_of_b = max(most_of_b, inside[keys[2]])
            try:
                place.expect_first_token(5)
                await asyncio.sleep(rng.random() * 0.01)
                if rng.random() < 0.5:
                    place.prompt_begun(5)
            finally:
                inside[key] -= 1
                place.leave()

        tasks = []
        for _ in range(200):
            tasks.append(asyncio.create_task(client(rng.choice(keys))))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.004)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        allowed = (ServiceUnavailable, QuotaExceeded, asyncio.CancelledError)
        assert all(end is None or isinstance(end, allowed) for end in ends), ends
        assert (most, most_of_b) == (3, 1)
        assert (admission.running, admission.waiting, admission.waiting_tokens) == (0, 0, 0)
        assert admission._shares == {}, "keys without requests are not remembered"
        for _ in range(3):
            await asyncio.wait_for(admission.enter(), 1)

    run(work())


# -- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "line", "order"),
    [(2, "aaab", "baaa"), (3, "aaabbb", "bababa"), (1, "ab", "ab"), (4, "aaabbc", "bcabaa")],
)
def test_places_go_to_the_key_with_the_fewest_and_then_in_turns(limit: int, line: str, order: str) -> None:
    """At first all places are those of `a`, and the oldest one is the next to become free."""

    async def work() -> None:
        admission, keys = Admission(limit), {name: make_key(name) for name in "abc"}
        places = [await admission.enter(keys["a"]) for _ in range(limit)]
        served = ""

        async def client(name: str) -> None:
            nonlocal served
            places.append(await admission.enter(keys[name]))
            served += name

        tasks = []
        for name in line:
            tasks.append(asyncio.create_task(client(name)))
            await asyncio.sleep(0)
        for number in range(1, len(line) + 1):
            places.pop(0).leave()
            await asyncio.wait_for(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED), 5)
            while len(served) < number:
                await asyncio.sleep(0)
        assert served == order
        await asyncio.gather(*tasks)

    run(work())


def test_a_full_line_makes_room_for_a_key_with_less_in_it() -> None:
    async def work() -> None:
        admission, many, few = Admission(2), make_key("many"), make_key("few")
        for _ in range(2):
            await admission.enter(many)
        crowd = [await queued(admission, many) for _ in range(4)]
        with pytest.raises(ServiceUnavailable):
            await admission.enter(many)
        first, second = await queued(admission, few), await queued(admission, few)
        await asyncio.wait({crowd[2]}, timeout=5)
        assert [task.done() for task in crowd] == [False, False, True, True], "the last comers gave way"
        with pytest.raises(ServiceUnavailable):
            await crowd[3]
        with pytest.raises(ServiceUnavailable):
            await admission.enter(few)  # both have their half
        assert admission.waiting == 4 and isinstance(crowd[2].exception(), ServiceUnavailable)
        for task in (*crowd[:2], first, second):
            task.cancel()

    run(work())


def test_a_key_at_its_limit_waits_while_others_are_served() -> None:
    async def work() -> None:
        admission, narrow = Admission(3), make_key("narrow", max_running=1, max_queued=1)
        place = await admission.enter(narrow)
        waiting = await queued(admission, narrow)
        with pytest.raises(QuotaExceeded, match="maxQueued = 1") as caught:
            await admission.enter(narrow)
        assert caught.value.retry_after_s is not None and admission.refused[KEY_QUEUED] == 1
        await asyncio.wait_for(admission.enter(make_key("other")), 1)
        assert not waiting.done()
        place.leave()
        await asyncio.wait_for(waiting, 1)

    run(work())


def test_a_key_whose_tokens_are_used_up_is_refused() -> None:
    async def work() -> None:
        admission, key = Admission(3), make_key("k", tokens_per_minute=60)
        place = await admission.enter(key)
        place.expect_first_token(60)
        for _ in range(30):
            place.token_generated()
        with pytest.raises(QuotaExceeded, match="tokensPerMinute = 60") as caught:
            admission.check_room(key)
        assert caught.value.retry_after_s == 31, "30 on credit, and one to go on with"
        assert admission.refused[KEY_TOKENS] == 1
        admission.check_room(None)

    run(work())


# -- prompt tokens -----------------------------------------------------------------------------------


def test_waiting_prompt_tokens_have_a_limit() -> None:
    async def work() -> None:
        admission = Admission(10, max_waiting_tokens=100)
        first, second, third = [await admission.enter() for _ in range(3)]
        first.expect_first_token(150)  # alone, or it could never be served
        with pytest.raises(ServiceUnavailable, match="maxWaitingTokens"):
            admission.check_room()
        first.prompt_begun(100)
        second.expect_first_token(50)
        with pytest.raises(ServiceUnavailable, match="100 prompt tokens wait for the model, and this"):
            third.expect_first_token(1)
        assert admission.refused[WAITING_TOKENS] == 2
        third.leave()  # of what it was refused it gives nothing back
        assert admission.waiting_tokens == 100
        first.leave()
        assert admission.waiting_tokens == 50, "what it still waited for"
        second.leave()
        assert admission.waiting_tokens == 0

    run(work())


# -- other limits ------------------------------------------------------------------------------------


def test_new_limits_hold_at_once_and_send_nobody_away() -> None:
    async def work() -> None:
        admission = Admission(1)
        places = [await admission.enter()]
        waiting = [await queued(admission) for _ in range(2)]
        admission.set_limit(3)
        places += await asyncio.wait_for(asyncio.gather(*waiting), 1)
        waiting = [await queued(admission) for _ in range(6)]
        admission.set_limit(1, max_waiting_tokens=1000)
        assert (admission.running, admission.waiting) == (3, 6)
        with pytest.raises(ServiceUnavailable):
            await admission.enter()
        for place in places[:2]:
            place.leave()
        assert (admission.running, admission.waiting) == (1, 6)
        places[2].leave()
        assert (admission.running, admission.waiting) == (1, 5)
        for task in waiting:
            task.cancel()

    run(work())
