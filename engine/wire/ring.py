"""Shared-memory rings: one writer, one reader, fixed slots, eventfds as the only synchronisation.

The parent creates a ring before it forks, so memory and eventfds are inherited. The file in /dev/shm is
unlinked as soon as it is mapped: whatever dies, and however, nothing is left behind. `filled` and `free`
count slots; both are read with one system call that takes all there is, and a system call orders memory on
every processor (aarch64 does not order plain stores).

When one side has died, the parent resets the ring for its successor, and both ends begin anew with the next
generation. Each slot carries the generation of its writer, so that nothing of an older one is ever acted on.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from dataclasses import dataclass

from engine.errors import EXIT_IPC, StartupError

SHM_DIR = "/dev/shm"

_STAMP = struct.Struct("<Q")  # before each slot: the generation of its writer


class RingError(Exception):
    """What lies on a ring was not written by the other side of this link."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The shared part. Each process opens its own end with RingWriter or RingReader."""

    memory: mmap.mmap
    slots: int
    slot_bytes: int
    filled_fd: int  # slots written and not yet taken
    free_fd: int  # slots the writer may fill

    def slot(self, index: int) -> memoryview:
        start = self._start(index) + _STAMP.size
        return memoryview(self.memory)[start : start + self.slot_bytes]

    def stamp(self, index: int, generation: int) -> None:
        _STAMP.pack_into(self.memory, self._start(index), generation)

    def stamped(self, index: int) -> int:
        generation: int = _STAMP.unpack_from(self.memory, self._start(index))[0]
        return generation

    def reset(self) -> None:
        """Empty it. Nobody may have an end open."""
        _take_all(self.filled_fd)
        _take_all(self.free_fd)
        os.eventfd_write(self.free_fd, self.slots)

    def _start(self, index: int) -> int:
        return (index % self.slots) * (_STAMP.size + self.slot_bytes)


def create_ring(name: str, slots: int, slot_bytes: int) -> Ring:
    """Make a ring in /dev/shm. `name` must be unique for this run.

    Raises StartupError (exit 7) when the file system is missing or too small for it.
    """
    size = slots * (_STAMP.size + slot_bytes)
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


def _peek(fd: int) -> int:
    """How much `_take_all` would take, without taking it; some 40 us, so not for every request."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        return next(int(line.split()[1], 16) for line in info if line.startswith("eventfd-count:"))


class RingWriter:
    def __init__(self, ring: Ring, generation: int = 0) -> None:
        self._ring = ring
        self._generation = generation
        self._next = 0
        self._free = 0  # slots known to be free
        self.slots, self.slot_bytes = ring.slots, ring.slot_bytes

    @property
    def num_used(self) -> int:
        """Slots written that the reader has not given back yet."""
        return self._ring.slots - self._free - _peek(self._ring.free_fd)

    def reserve(self) -> memoryview | None:
        """The next slot to fill, or None when the reader has not freed one yet."""
        return self._ring.slot(self._next) if self.has_room(1) else None

    def has_room(self, slots: int) -> bool:
        """Whether so many can be reserved, one after the other."""
        if self._free < slots:
            self._free += _take_all(self._ring.free_fd)
        return self._free >= slots

    def wait_free(self, timeout_s: float) -> bool:
        """Block until a slot is free; False when none was freed in time."""
        return bool(self._free) or bool(select.select([self._ring.free_fd], [], [], timeout_s)[0])

    def commit(self) -> None:
        """Hand the reserved slot to the reader."""
        self._ring.stamp(self._next, self._generation)
        self._next += 1
        self._free -= 1
        os.eventfd_write(self._ring.filled_fd, 1)


class RingReader:
    def __init__(self, ring: Ring, generation: int = 0) -> None:
        self._ring = ring
        self._generation = generation
        self._next = 0
        self._filled = 0  # slots known to be filled

    @property
    def num_used(self) -> int:
        """Slots the writer has filled and we have not released yet."""
        return self._filled + _peek(self._ring.filled_fd)

    @property
    def num_at_hand(self) -> int:
        """Slots that `take` returns without asking the system; there may be more."""
        return self._filled

    def fileno(self) -> int:
        """Readable when slots were filled beyond those at hand."""
        return self._ring.filled_fd

    def take(self) -> memoryview | None:
        """The oldest unread slot, valid until `release`; None when there is none.

        Raises RingError when it was written for another generation.
        """
        if not self._filled:
            self._filled = _take_all(self._ring.filled_fd)
        if not self._filled:
            return None
        if self._ring.stamped(self._next) != self._generation:
            raise RingError(
                f"a slot of generation {self._ring.stamped(self._next)} on a link of {self._generation}"
            )
        return self._ring.slot(self._next)

    def release(self) -> None:
        """Give the slot last taken back to the writer."""
        self._next += 1
        self._filled -= 1
        os.eventfd_write(self._ring.free_fd, 1)
