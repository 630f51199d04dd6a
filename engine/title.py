"""The name every process shows: `pkill mindie` looks at one string, `ps -ef | grep` at another."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

PROCESS_NAME = "mindieservice_daemon"

_PR_SET_NAME = 15


def set_process_name(name: str = PROCESS_NAME) -> None:
    """Set the kernel's name of the main thread; it keeps the first 15 bytes. Call it in the main thread.

    Needed again after heavy imports: torch is reported to rename the thread that imports it.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def hide_interpreter() -> None:
    """Let ps show `./bin/mindieservice_daemon ...` without the interpreter's path in front.

    Arguments of another shape (python -m, a test runner) are left alone.
    """
    arguments = Path("/proc/self/cmdline").read_bytes()
    interpreter, _, rest = arguments.partition(b"\0")
    if rest.startswith(sys.argv[0].encode()) and interpreter:
        _overwrite(arguments, rest)


def show_command(command: str) -> None:
    """Let ps show `command`, as much of it as there is room for, instead of how the process was started."""
    _overwrite(Path("/proc/self/cmdline").read_bytes(), command.encode())


def _overwrite(arguments: bytes, text: bytes) -> None:
    """Write into the argument area in place; forked children inherit it. `arguments`: what it holds."""
    # fields 48 and 49 of stat, counted after the command name (which may contain anything)
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[45]), int(stat[46])
    if end - start == len(arguments):
        ctypes.memmove(start, text[: len(arguments) - 1].ljust(len(arguments), b"\0"), len(arguments))
