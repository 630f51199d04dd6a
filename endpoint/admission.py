"""How many requests are served at once, and how many may wait."""

from __future__ import annotations

import asyncio
from collections import deque

from engine.errors import ServiceUnavailable


class Admission:
    """At most `limit` requests at once, twice as many waiting in order, the next one refused."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether the next one would be refused."""
        return self._running >= self._limit and len(self._waiting) >= 2 * self._limit

    async def enter(self) -> None:
        """Take a place, or stand in line for one. Raises ServiceUnavailable when the line is full."""
        if self._running < self._limit:
            self._running += 1
            return
        if len(self._waiting) >= 2 * self._limit:
            raise ServiceUnavailable(
                f"the server is full: {self._limit} requests are running (maxLinkNum) and {2 * self._limit} "
                "are waiting; try again later",
                retry_after_s=1,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            # not `await turn`: that would cancel it, and whether the place was handed over could not be told
            await asyncio.wait({turn})
        except asyncio.CancelledError:
            if turn.done():
                self.leave()
            else:
                self._waiting.remove(turn)
            raise

    def set_limit(self, limit: int) -> None:
        """From now on at most `limit` requests at once; those that run go on."""
        self._limit = limit
        while self._waiting and self._running < limit:
            self._running += 1
            self._waiting.popleft().set_result(None)

    def leave(self) -> None:
        """Give the place to the next in line."""
        if self._waiting and self._running <= self._limit:
            self._waiting.popleft().set_result(None)
        else:
            self._running -= 1
