"""Shared-memory rings: one writer, one reader, fixed slots, eventfds as the only synchronisation.

The parent creates a ring before it forks, so memory and eventfds are inherited. The file in /dev/shm is
unlinked as soon as it is mapped: whatever dies, and however, nothing is left behind. `filled` and `free`
count slots; both are read with one system call that takes all there is, and a system call orders memory on
every processor (aarch64 does not order plain stores).
"""

from __future__ import annotations

import mmap
import os
import select
from dataclasses import dataclass

from engine.errors import EXIT_IPC, StartupError

SHM_DIR = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Ring:
    """The shared part. Each process opens its own end with RingWriter or RingReader."""

    memory: mmap.mmap
    slots: int
    slot_bytes: int
    filled_fd: int  # slots written and not yet taken
    free_fd: int  # slots the writer may fill

    def slot(self, index: int) -> memoryview:
        start = (index % self.slots) * self.slot_bytes
        return memoryview(self.memory)[start : start + self.slot_bytes]


def create_ring(name: str, slots: int, slot_bytes: int) -> Ring:
    """Make a ring in /dev/shm. `name` must be unique for this run.

    Raises StartupError (exit 7) when the file system is missing or too small for it.
    """
    size = slots * slot_bytes
    path = os.path.join(SHM_DIR, name)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"cannot create {path}: {error.strerror}", EXIT_IPC) from None
    try:
        os.unlink(path)
        # allocate now: a full file system is an error here and would be a SIGBUS in the middle of a request
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size)
    except OSError as error:
        free = os.statvfs(SHM_DIR)
        raise StartupError(
            f"{SHM_DIR}: {size >> 20} MiB needed for {name}, {free.f_bavail * free.f_frsize >> 20} MiB free "
            f"({error.strerror}); in a container start it with --shm-size=1g",
            EXIT_IPC,
        ) from None
    finally:
        os.close(fd)
    return Ring(memory, slots, slot_bytes, _counter(0), _counter(slots))


def _counter(initial: int) -> int:
    return os.eventfd(initial, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _take_all(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class RingWriter:
    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._next = 0
        self._free = 0  # slots known to be free

    def reserve(self) -> memoryview | None:
        """The next slot to fill, or None when the reader has not freed one yet."""
        if not self._free:
            self._free = _take_all(self._ring.free_fd)
        return self._ring.slot(self._next) if self._free else None

    def wait_free(self, timeout_s: float) -> bool:
        """Block until a slot is free; False when none was freed in time."""
        return bool(self._free) or bool(select.select([self._ring.free_fd], [], [], timeout_s)[0])

    def commit(self) -> None:
        """Hand the reserved slot to the reader."""
        self._next += 1
        self._free -= 1
        os.eventfd_write(self._ring.filled_fd, 1)


class RingReader:
    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._next = 0
        self._filled = 0  # slots known to be filled

    def fileno(self) -> int:
        """Readable when slots were filled since the last `take` that found none left."""
        return self._ring.filled_fd

    def take(self) -> memoryview | None:
        """The oldest unread slot, valid until `release`; None when there is none."""
        if not self._filled:
            self._filled = _take_all(self._ring.filled_fd)
        return self._ring.slot(self._next) if self._filled else None

    def release(self) -> None:
        """Give the slot last taken back to the writer."""
        self._next += 1
        self._filled -= 1
        os.eventfd_write(self._ring.free_fd, 1)
