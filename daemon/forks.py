"""Forking, at any time of the parent's life: what a child inherits, and what it must not keep."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from daemon.child import run_child
from daemon.plan import ProcessSpec
from daemon.signals import HANDLED
from engine.errors import EXIT_INIT
from engine.wire.links import Control
from engine.wire.vitals import Pulse

log = logging.getLogger("server.child")


@dataclass(frozen=True, slots=True)
class Birth:
    """One child to be: a replacement differs from its predecessor in everything but the spec."""

    spec: ProcessSpec
    serial: int  # counts the children of this daemon
    generation: int  # worker: of the link it begins with; endpoint: how many there were before it
    pulse: Pulse

    @property
    def identity(self) -> str:
        """Its name on the control channel, never used again: a late word of a dead child is nobody's."""
        return f"{self.spec.identity}.{self.serial}"


Entry = Callable[[Birth, Control], int]


class Forker:
    def __init__(self, entry: Entry, listeners: Sequence[socket.socket], wakeup_fd: int) -> None:
        """`listeners` are kept open, so that a new endpoint finds them as the old one left them."""
        self._entry = entry
        self._listeners = listeners
        self._wakeup_fd = wakeup_fd
        self._parent_pid = os.getpid()
        # the parent never writes and no child keeps the writing end: its end of file is the parent's death
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._ours: set[int] = set()

    def settle(self) -> None:
        """What is open now may be inherited; whatever the parent opens later, children close."""
        self._ours = _open_fds()

    def fork(self, birth: Birth, control_address: str) -> int:
        """The child's pid. `control_address`: where the parent listens, or is about to. Raises OSError."""
        if not self._ours:
            self.settle()
        _flush_stderr()
        # a signal that met a child before it has its own handlers would be written to our pipe
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of the threads that libzmq has by now; a child touches nothing of theirs
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                self._become(birth, control_address)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        return pid

    def _become(self, birth: Birth, control_address: str) -> NoReturn:
        """In the child. It must not return by any way: it would go on as a second parent."""
        try:
            self._close_what_is_not_for(birth.spec)
            run_child(
                self._parent_pid,
                self._lifeline_read,
                control_address,
                birth.identity,
                partial(self._entry, birth),
            )
        except Exception:
            log.exception("%s could not begin", birth.spec)
        finally:
            os._exit(EXIT_INIT)

    def close_listeners(self) -> None:
        """From now on connections are refused, unless an endpoint still holds them."""
        for sock in self._listeners:
            sock.close()

    def _close_what_is_not_for(self, spec: ProcessSpec) -> None:
        for fd in _open_fds() - self._ours | {self._lifeline_write, self._wakeup_fd}:
            with contextlib.suppress(OSError):  # closed all the same: the error is about an older write
                os.close(fd)
        if spec.role != "endpoint":
            self.close_listeners()


def _open_fds() -> set[int]:
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}  # not the one they were listed by


def _flush_stderr() -> None:
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.flush()
