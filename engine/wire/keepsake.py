"""A few bytes that a worker leaves to its successor.

What one has found out by measuring must not be decided anew by the next: another kernel rounds otherwise, and
an answer that goes on after a death would not be the one it would have been.
"""

from __future__ import annotations

import mmap
import struct

_LENGTH = struct.Struct("<Q")
_ROOM = 4096


class Keepsake:
    """Create it before the first fork. Written once, by the first worker that gets so far."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _ROOM)

    def read(self) -> bytes:
        """Empty when nothing has been left."""
        (length,) = _LENGTH.unpack_from(self._page)
        return self._page[_LENGTH.size : _LENGTH.size + length]

    def leave(self, content: bytes) -> None:
        """Kept whole or not at all, should the writer die over it. `content`: at most some 4,000 bytes."""
        assert len(content) <= _ROOM - _LENGTH.size, len(content)
        self._page[_LENGTH.size : _LENGTH.size + len(content)] = content
        _LENGTH.pack_into(self._page, 0, len(content))
