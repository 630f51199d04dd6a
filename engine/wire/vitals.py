"""One shared page on which every child says by when it will have said so again; the parent only reads.

A process that is stopped, stuck in a driver or spinning cannot answer a question, but it can be seen to
have missed its own deadline. Each deadline is one aligned word with one writer: there is nothing to lock.
"""

from __future__ import annotations

import mmap
import struct
import time

_WORD = struct.Struct("<Q")  # CLOCK_MONOTONIC, which all processes share, in nanoseconds; 0: none


class Vitals:
    """Create it before the first fork; `slots` children have a place."""

    def __init__(self, slots: int) -> None:
        self._page = mmap.mmap(-1, max(1, slots) * _WORD.size)

    def pulse(self, slot: int) -> Pulse:
        return Pulse(self._page, slot)

    def overdue_s(self, slot: int) -> float:
        """Seconds since the deadline of this child; negative before it, and when it has none."""
        (deadline,) = _WORD.unpack_from(self._page, slot * _WORD.size)
        return (time.monotonic_ns() - deadline) / 1e9 if deadline else -1.0


class Pulse:
    """A child's own word."""

    def __init__(self, page: mmap.mmap, slot: int) -> None:
        self._page = page
        self._offset = slot * _WORD.size

    def expect_within(self, seconds: float) -> None:
        """Promise to call this again before so many seconds are over."""
        _WORD.pack_into(self._page, self._offset, time.monotonic_ns() + int(seconds * 1e9))

    def rest(self) -> None:
        """Promise nothing."""
        _WORD.pack_into(self._page, self._offset, 0)
