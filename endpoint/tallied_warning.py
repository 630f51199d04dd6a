"""One WARN line for many events of a kind: a flood must not become a flood of the log."""

from __future__ import annotations

import logging
import time
from collections import Counter

_PERIOD_S = 10.0
_SHOWN = 5
_MOST_LABELS = 1000  # told apart between two lines


class TalliedWarning:
    """The first event is told at once, what comes within ten seconds of a line together with the next."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._since: Counter[str] = Counter()
        self._told_at = -_PERIOD_S

    def note(self, label: str) -> None:
        """`label`: what the events are told apart by, of our own making."""
        if label not in self._since and len(self._since) >= _MOST_LABELS:
            label = "others"
        self._since[label] += 1
        now = time.monotonic()
        if now - self._told_at < _PERIOD_S:
            return
        most = ", ".join(f"{name}: {count}" for name, count in self._since.most_common(_SHOWN))
        others = f", and {len(self._since) - _SHOWN} others" if len(self._since) > _SHOWN else ""
        self._log.warning(
            "%s since the last such line: %d (%s%s)", self._what, self._since.total(), most, others
        )
        self._since.clear()
        self._told_at = now
