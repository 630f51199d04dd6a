"""How fast a line gets shorter, measured while somebody stands in it; what Retry-After is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_MEMORY_S = 30.0  # of waiting: what left the line longer ago than this hardly counts
_LEAST_S, _MOST_S = 1, 60


class DrainRate:
    """Exponentially weighted: what left over the seconds in which somebody waited.

    Seconds in which nobody waits do not count, or a quiet night would make the next morning's line look slow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._drained = 0.0
        self._seconds = 0.0
        self._still_s = 0.0  # somebody has waited so long since the last one left

    def advance(self, waiting: float, drained: float = 0.0) -> None:
        """Up to now `waiting` stood in line; `drained` of it leaves now. Call it before either changes."""
        now = self._clock()
        elapsed, self._at = now - self._at, now
        if waiting <= 0:
            return
        self._still_s = 0.0 if drained else self._still_s + elapsed
        kept = math.exp(-elapsed / _MEMORY_S)
        self._drained = self._drained * kept + drained
        self._seconds = self._seconds * kept + _MEMORY_S * (1 - kept)

    def retry_after_s(self, waiting: float) -> int:
        """Whole seconds in [1, 60] until `waiting` has drained at the measured rate.

        As long as nothing has drained: as long again as that has lasted.
        """
        self.advance(waiting)
        seconds = self._still_s
        if self._drained > 0:
            seconds = min(waiting * self._seconds / self._drained, _MOST_S)
        return max(_LEAST_S, min(_MOST_S, math.ceil(seconds)))
