"""What a child does between fork and its work: a fixed list, so that one can read what it inherits."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from engine.errors import EXIT_INIT, StartupError
from engine.logs.room import close_logs, enter_child
from engine.title import set_process_name
from engine.wire.links import Control
from engine.wire.messages import Fatal

log = logging.getLogger("server.child")

_PR_SET_PDEATHSIG = 1


def run_child(
    parent_pid: int, lifeline_fd: int, control_address: str, identity: str, entry: Callable[[Control], int]
) -> NoReturn:
    """Become a child of `parent_pid` and end with the entry's exit code. Call it right after fork."""
    code = EXIT_INIT
    try:
        _die_with_parent(parent_pid, lifeline_fd)
        _reset_signals()
        is_endpoint = identity.startswith("endpoint")
        enter_child("server" if is_endpoint else "llm", reads_requests=is_endpoint)
        if sys.stderr is not None:
            faulthandler.enable()
        random.seed()
        set_process_name()
        control = Control(control_address, identity)
        try:
            code = entry(control)
        except StartupError as error:
            code = error.exit_code
            control.channel.send(Fatal(code, str(error)))
        except Exception as error:  # the outermost loop of this process: report, then die
            log.exception("%s failed", identity)
            control.channel.send(Fatal(code, f"{type(error).__name__}: {error}".splitlines()[0]))
        control.close()
    finally:
        close_logs()
        with contextlib.suppress(OSError, AttributeError):  # closed, full, or without a reader
            sys.stderr.flush()
        # not sys.exit: the parent's atexit handlers and buffers are not ours to run
        os._exit(code)


def _die_with_parent(parent_pid: int, lifeline_fd: int) -> None:
    """SIGKILL from the kernel when the parent dies; a thread on the lifeline pipe as the second strap."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(EXIT_INIT)

    def wait_for_end_of_file() -> None:
        os.read(lifeline_fd, 1)  # the parent never writes
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end_of_file, name="lifeline", daemon=True).start()


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGHUP):  # what SIGHUP changes comes from the parent
        signal.signal(number, signal.SIG_IGN)
    # Ctrl+C reaches the whole foreground group; the parent alone conducts the stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
