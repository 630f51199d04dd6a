"""One line for many events of a kind: a flood of them must not become a flood of the log."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict

_EVERY_S = 10.0
_SHOWN = 5
_MOST_LABELS = 1000  # told apart between two lines


class QuietLog:
    """Tells the first event of a kind at once, and what follows in ten seconds together with the next one."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._told: dict[str, float] = {}
        self._untold: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def warning(self, kind: str, message: str, label: str = "") -> None:
        """`kind`: one of a closed set, because every kind is remembered. `label`: what its events are told
        apart by, such as an address."""
        untold = self._untold[kind]
        if label not in untold and len(untold) >= _MOST_LABELS:
            label = "others"
        untold[label] += 1
        now = time.monotonic()
        if now - self._told.get(kind, -math.inf) < _EVERY_S:
            return
        self._told[kind] = now
        self._log.warning("%s%s", message, _tally(untold))
        untold.clear()


def _tally(untold: Counter[str]) -> str:
    total = untold.total()
    labels = ", ".join(f"{label}: {count}" for label, count in untold.most_common(_SHOWN) if label)
    if len(untold) > _SHOWN:
        labels += f", and {len(untold) - _SHOWN} others"
    told = [f"{total} since the last such line"] if total > 1 else []
    told += [labels] if labels else []
    return f" ({'; '.join(told)})" if told else ""
