"""A few bytes that a worker leaves to all others, those beside it and those after it.

What one has found out by measuring must not be decided anew by another: another kernel rounds otherwise, and
an answer would depend on which instance makes it, or goes on with it after a death.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<Q")
_ROOM = 4096


class Keepsake:
    """Create it before the first fork. Written once, by the first worker that gets so far."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("mindie_keepsake")
        os.ftruncate(self._fd, _ROOM)
        self._page = mmap.mmap(self._fd, _ROOM)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Find out and leave, or read, while no other process does; the kernel lets go for one that dies."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def read(self) -> bytes:
        """Empty when nothing has been left."""
        (length,) = _LENGTH.unpack_from(self._page)
        return self._page[_LENGTH.size : _LENGTH.size + length]

    def leave(self, content: bytes) -> None:
        """Kept whole or not at all, should the writer die over it. `content`: at most some 4,000 bytes."""
        assert len(content) <= _ROOM - _LENGTH.size, len(content)
        self._page[_LENGTH.size : _LENGTH.size + len(content)] = content
        _LENGTH.pack_into(self._page, 0, len(content))
