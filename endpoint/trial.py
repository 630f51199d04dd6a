"""A trial inference: whether the engine still makes tokens, found out by asking it for one."""

from __future__ import annotations

import asyncio
import time

from endpoint.engine_client import EngineClient
from engine.errors import NotFound, RequestTimeout
from engine.sampling_params import SamplingParams

DEFAULT_WAIT_S = 10
_MAX_WAIT_S = 600
_FIRST = 1  # priority: behind a long queue the trial would time out without anything being wrong
_PROMPT = (0,)
_ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


def wait_time(text: str) -> int:
    """The seconds of `/health/timed-{seconds}`. Raises NotFound, as a wrong path does."""
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= _MAX_WAIT_S):
        raise NotFound(f"the wait time in /health/timed-N must be an integer in [1, {_MAX_WAIT_S}] seconds")
    return int(text)


async def run_trial(engine: EngineClient, wait_s: float) -> None:
    """Return once the engine has made the trial's token, or made any token for anybody within `wait_s`.

    Raises RequestTimeout when it made none, EngineFailed or ServiceUnavailable when it cannot.
    """
    start = time.monotonic()
    try:
        await asyncio.wait_for(_one_token(engine, start, wait_s), wait_s)
    except asyncio.TimeoutError:
        if engine.last_token_at < start:
            raise RequestTimeout(f"Engine callback timeout: no token within {wait_s:g} s") from None


async def _one_token(engine: EngineClient, arrival: float, wait_s: float) -> None:
    flight = await engine.submit([(_PROMPT, _ONE_TOKEN)], _FIRST, arrival=arrival, token_limit_s=wait_s)
    try:
        await flight.next()
    finally:
        engine.close(flight)
