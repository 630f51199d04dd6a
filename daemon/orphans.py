"""Grandchildren, such as the compilers a device stack starts: they are not to outlive the service."""

from __future__ import annotations

import contextlib
import ctypes

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_END_S = 0.5


def adopt_orphans() -> None:
    """Make orphaned grandchildren our children instead of init's, so that they can be found at the end."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_stragglers() -> None:
    """End those that have outlived their parents."""
    stragglers = psutil.Process().children(recursive=True)
    for process in stragglers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stragglers, timeout=_END_S)
