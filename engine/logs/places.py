"""Where lines go: a rotating file, or a standard stream. A place may refuse lines; a Sink counts those."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from engine.logs.codes import LOG_RECOVERED, LOG_REFUSED, code
from engine.logs.options import Rotation

log = logging.getLogger("logs")  # speaks for the process, whichever it is

_COMPLAIN_EVERY_S = 60.0  # about one place: a slow reader makes it fail and recover all the time
_FOLDER_MODE = 0o750
_OPEN_MODE = 0o640
_BACKUP_MODE = 0o440


class Refused(Exception):
    """A place took only the first `taken` of the lines it was given."""

    def __init__(self, reason: str, taken: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.taken = taken


class Place(Protocol):
    name: str

    def append(self, lines: Sequence[bytes]) -> None:
        """Write whole lines, each with its line end. Raises Refused."""

    def close(self) -> None: ...


class Sink:
    """A place that never fails its writers: lines it refuses are counted, and told of when it recovers."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.lost = 0  # lines, since the start
        self._missing = 0  # lines that nobody has been told of
        self._reason = ""
        self._quiet_until = 0.0  # monotonic seconds

    def write(self, lines: Sequence[bytes]) -> None:
        try:
            self._place.append(lines)
        except Refused as refused:
            self._count(len(lines) - refused.taken, refused.reason)
        else:
            if self._reason:
                self._recovered()

    def close(self) -> None:
        self._place.close()

    def _count(self, lines: int, reason: str) -> None:
        self.lost += lines
        self._missing += lines
        if self._reason:
            return
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _COMPLAIN_EVERY_S
            self._reason = reason
            log.warning(
                "%s cannot be written: %s; its lines are dropped and counted until it can",
                self._place.name, reason, extra=code(LOG_REFUSED),
            )  # fmt: skip

    def _recovered(self) -> None:
        reason, self._reason = self._reason, ""
        missing, self._missing = self._missing, 0
        log.warning(
            "%s is written again: %d lines were lost (%s)",
            self._place.name, missing, reason, extra=code(LOG_RECOVERED),
        )  # fmt: skip


class _Pen:
    """Writes lines through one function, and ends a line that was cut before it begins the next one."""

    def __init__(self) -> None:
        self._torn = False

    def write(self, lines: Sequence[bytes], write: Callable[[bytes], int]) -> int:
        """Bytes written. Raises Refused."""
        data = b"\n" * self._torn + b"".join(lines)
        done = 0
        try:
            while done < len(data):
                done += write(data[done:])
        except OSError as error:
            text = data[:done]
            if done:
                self._torn = not text.endswith(b"\n")
            reason = "nobody reads it" if isinstance(error, BlockingIOError) else error.strerror
            raise Refused(reason or str(error), _whole(lines, text.count(b"\n"))) from None
        self._torn = False
        return done


def _whole(lines: Sequence[bytes], newlines: int) -> int:
    """How many of the lines hold no more than so many line ends together; a traceback's has several."""
    for taken, line in enumerate(lines):
        newlines -= line.count(b"\n")
        if newlines < 0:
            return taken
    return len(lines)


class RotatingFile:
    """`<stem>.log`, with `<stem>.01.log` the newest of its backups. Opened at its first line.

    Folders and files get their modes whatever the umask is. A link in the place of the file or of a folder
    that holds it is refused: it would decide what is written over.
    """

    def __init__(self, folder: Path, stem: str, rotation: Rotation) -> None:
        """`folder`: made when it is not there, with up to two above it."""
        self.name = str(folder / f"{stem}.log")
        self._folder = folder
        self._stem = stem
        self._rotation = rotation
        self._fd = -1
        self._size = 0
        self._pen = _Pen()

    def append(self, lines: Sequence[bytes]) -> None:
        start = 0
        try:
            while start < len(lines):
                if self._fd < 0:
                    self._open()
                end, size = start, self._size
                # one line at least goes into every file
                while end < len(lines) and (not size or size + len(lines[end]) <= self._rotation.max_bytes):
                    size += len(lines[end])
                    end += 1
                if end == start:
                    self._rotate()
                    continue
                self._size += self._pen.write(lines[start:end], self._write)
                start = end
        except Refused as refused:
            raise Refused(refused.reason, start + refused.taken) from None
        except OSError as error:
            raise Refused(error.strerror or str(error), start) from None

    def close(self) -> None:
        """A child that has been forked may find it closed already."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def _open(self) -> None:
        for folder in (self._folder.parent.parent, self._folder.parent, self._folder):
            _make_folder(folder)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._fd = os.open(self._file(0), flags, _OPEN_MODE)
        os.fchmod(self._fd, _OPEN_MODE)
        self._size = os.fstat(self._fd).st_size

    def _file(self, number: int) -> Path:
        """0: the current one, else that backup."""
        return self._folder / (f"{self._stem}.{number:02d}.log" if number else f"{self._stem}.log")

    def _rotate(self) -> None:
        backups = self._rotation.files - 1
        with contextlib.suppress(FileNotFoundError):
            self._file(backups).unlink()
        for number in range(backups - 1, -1, -1):
            with contextlib.suppress(FileNotFoundError):
                self._file(number).rename(self._file(number + 1))
        if backups:
            os.fchmod(self._fd, _BACKUP_MODE)
        self.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if folder.is_symlink():
            raise OSError(0, f"{folder} is a symbolic link; name the folder it points to") from None
    else:
        folder.chmod(_FOLDER_MODE)


class StandardStream:
    """File descriptor 1 or 2, never waited for: when nobody reads it, it refuses.

    A pipe or terminal is opened again, because O_NONBLOCK on the inherited descriptor would hold for
    everybody who shares it, the shell included.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self._own_fd = -1
        self._pen = _Pen()
        kind = os.fstat(fd).st_mode
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(kind) else None
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            with contextlib.suppress(OSError):  # somebody else's: then it is written as it is
                self._own_fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)

    def append(self, lines: Sequence[bytes]) -> None:
        self._pen.write(lines, self._write)

    def close(self) -> None:
        """A child that has been forked may find it closed already."""
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.close()
            if self._own_fd >= 0:
                os.close(self._own_fd)
        self._own_fd = -1

    def _write(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        return os.write(self._own_fd if self._own_fd >= 0 else self._fd, data)
