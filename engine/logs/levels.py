"""Levels that change while the service runs: one page of memory that every process looks at."""

from __future__ import annotations

import logging
import mmap
import struct
from collections.abc import Mapping

from engine.logs.options import COMPONENTS

_HEAD = struct.Struct("<Q")  # number of the change << 16 | length of its text
_SLOTS = (64, 2048)  # where the texts of even and odd changes lie
_MOST_BYTES = 1024


class LevelBoard:
    """Written by the parent, read by it and by whatever it has forked. "" means: as the environment says.

    A change is written beside the last one and then pointed to, so nobody reads half of it.
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)  # shared with children, and no file anywhere

    def publish(self, text: str) -> None:
        number = self.read()[0] + 1
        encoded = text.encode()[:_MOST_BYTES]
        start = _SLOTS[number % 2]
        self._page[start : start + len(encoded)] = encoded
        self._page[: _HEAD.size] = _HEAD.pack(number << 16 | len(encoded))

    def read(self) -> tuple[int, str]:
        """The number of the last change, 0 before the first, and its text."""
        (head,) = _HEAD.unpack_from(self._page)
        number, length = head >> 16, head & 0xFFFF
        start = _SLOTS[number % 2]
        return number, self._page[start : start + length].decode()


def apply_levels(levels: Mapping[str, str], own: str) -> None:
    """`levels`: by component. `own`: the component of this process, whose level libraries share.

    But never DEBUG: nobody has checked what libraries write there, and it could be a prompt.
    """
    for component in COMPONENTS:
        logging.getLogger(component).setLevel(levels[component])
    root = logging.getLogger()
    root.setLevel(levels[own])
    root.setLevel(max(root.level, logging.INFO))
