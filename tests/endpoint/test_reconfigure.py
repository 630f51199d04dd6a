"""Limits that change while requests wait and run."""

from __future__ import annotations

import asyncio

from endpoint.admission import Admission


def test_F25_a_higher_limit_lets_those_in_who_wait() -> None:
    async def run() -> None:
        admission = Admission(1)
        place = await admission.enter()
        waiting = [asyncio.ensure_future(admission.enter()) for _ in range(2)]
        await asyncio.sleep(0)
        admission.set_limit(2)
        await waiting[0]
        assert not waiting[1].done()
        place.leave()
        await waiting[1]

    asyncio.run(run())


def test_F25_a_lower_limit_waits_for_those_who_run() -> None:
    async def run() -> None:
        admission = Admission(2)
        places = [await admission.enter(), await admission.enter()]
        waiting = asyncio.ensure_future(admission.enter())
        await asyncio.sleep(0)
        admission.set_limit(1)
        places[0].leave()
        await asyncio.sleep(0)
        assert not waiting.done(), "one still runs, and one may"
        places[1].leave()
        await waiting

    asyncio.run(run())
