"""The private directory for ipc sockets, unique per run, and the sweep of what dead runs left."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from engine.errors import EXIT_IPC, StartupError
from engine.wire.ring import SHM_DIR

log = logging.getLogger("server.rundir")

_PREFIX = "mindie"
# sun_path holds 108 bytes including the end; the longest file name of ours, evt.<i>.<generation>, has 15
_MAX_DIR_CHARS = 90


def run_name() -> str:
    """`mindie_<uid>_<pid>_<start time>`: tells whose it is and whether that run still lives."""
    pid = os.getpid()
    return f"{_PREFIX}_{os.getuid()}_{pid}_{_start_time(pid)}"


def make_run_dir(parent: Path | None, name: str) -> Path:
    """Create the 0700 directory. Raises StartupError (exit 7) naming the path and the cause."""
    base = parent or Path(tempfile.gettempdir())
    path = base / name
    if len(str(path)) > _MAX_DIR_CHARS:
        raise StartupError(
            f"{path}: {len(str(path))} characters are too many for socket files (at most {_MAX_DIR_CHARS}); "
            "set BackendConfig.runtimeConfig.ipcDir to a shorter directory",
            EXIT_IPC,
        )
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except OSError as error:
        raise StartupError(f"cannot create the socket directory {path}: {error.strerror}", EXIT_IPC) from None
    return path


def sweep_stale(parent: Path | None) -> None:
    """Remove run directories and shared memory of our own dead runs; touch nothing else."""
    for base in {parent or Path(tempfile.gettempdir()), Path(SHM_DIR)}:
        for path in base.glob(f"{_PREFIX}_*"):
            match path.name.split("_"):
                case [_, uid, pid, started, *_] if pid.isdigit() and uid.isdigit():
                    _remove_if_dead(path, int(uid), int(pid), started)


def _remove_if_dead(path: Path, uid: int, pid: int, started: str) -> None:
    try:
        owner = path.lstat().st_uid
    except FileNotFoundError:  # another daemon is just starting and unlinks its own
        return
    if owner != os.getuid():
        log.info("%s is owned by uid %d; left alone", path, uid)
        return
    if _start_time(pid) == started:
        return
    log.info("removing %s, left by a run that is gone", path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since boot; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
