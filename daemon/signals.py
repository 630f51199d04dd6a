"""Signals become numbers in a pipe, read by the supervisor's loop; nothing is done in a handler."""

from __future__ import annotations

import os
import signal
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)


def install_signal_pipe() -> int:
    """Let signals write their number to a pipe; its reading end.

    SIGHUP stays ignored where it was: under nohup it must not even wake us.
    """
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in HANDLED:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)  # launch.py holds them back until now
    return read_fd


def drain_signals(read_fd: int) -> bytes:
    """The numbers that have come, a byte each."""
    try:
        return os.read(read_fd, 4096)
    except BlockingIOError:
        return b""


def _nothing(number: int, frame: FrameType | None) -> None:
    """A Python handler must exist for the wakeup fd to be written."""
