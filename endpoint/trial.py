"""A trial inference: whether the engine still makes tokens, found out by asking it for one."""

from __future__ import annotations

import asyncio
import time

from endpoint.engine_client import EngineClient
from engine.errors import NotFound, RequestTimeout
from engine.sampling_params import SamplingParams
from engine.wire.messages import PROBE

DEFAULT_WAIT_S = 10
_MAX_WAIT_S = 600
_PROMPT = (0,)
_ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


def wait_time(text: str) -> int:
    """The seconds of `/health/timed-{seconds}`. Raises NotFound, as a wrong path does."""
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= _MAX_WAIT_S):
        raise NotFound(f"the wait time in /health/timed-N must be an integer in [1, {_MAX_WAIT_S}] seconds")
    return int(text)


class Trials:
    """Trial inferences of one endpoint: one at a time, shared by all who ask while it is under way.

    They stand before every user's request in the engine, and in no metric.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._running: asyncio.Task[None] | None = None
        self._num_waiting = 0

    async def run(self, wait_s: float) -> None:
        """Return once the engine has made a token, for the trial or for anybody, within `wait_s`.

        Raises RequestTimeout when it made none, EngineFailed or ServiceUnavailable when it cannot.
        """
        start = time.monotonic()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._one_token())
        trial = self._running
        self._num_waiting += 1
        try:
            await asyncio.wait_for(asyncio.shield(trial), wait_s)
        except asyncio.TimeoutError:
            if self._engine.last_token_at < start:
                raise RequestTimeout(f"Engine callback timeout: no token within {wait_s:g} s") from None
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:  # an abandoned trial would keep its place in the engine
                self._running.cancel()

    async def _one_token(self) -> None:
        flight = await self._engine.submit(
            [(_PROMPT, _ONE_TOKEN)], PROBE, arrival=time.monotonic(), token_limit_s=_MAX_WAIT_S
        )
        try:
            await flight.next()
        finally:
            self._engine.close(flight)
