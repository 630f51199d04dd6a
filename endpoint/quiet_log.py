"""One line for many events of a kind, so that a flood of them cannot fill the log."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

_EVERY_S = 10.0


class QuietLog:
    """Tells the first event of a kind at once, and then one per interval with the number of the others."""

    def __init__(self, log: logging.Logger, every_s: float = _EVERY_S) -> None:
        self._log = log
        self._every_s = every_s
        self._told: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def warning(self, kind: str, message: str) -> None:
        """`kind`: one of a closed set, because every kind is remembered."""
        now = time.monotonic()
        if now - self._told.get(kind, -math.inf) < self._every_s:
            self._untold[kind] += 1
            return
        self._told[kind] = now
        untold = self._untold.pop(kind, 0)
        self._log.warning("%s%s", message, f" ({untold} more since the last such line)" if untold else "")
