"""What scripts/chaos.py does to a daemon."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from footprint import children_by_role
from fuzz_cases import HOST
from own_daemon import OwnDaemon

PAUSE_S = 1.0
HALF_OPEN = 50
REPLACED_WITHIN_S = 120.0


@dataclass(slots=True)
class Target:
    """What is broken, and what that leaves to be tidied up."""

    daemon: OwnDaemon
    rng: random.Random
    struck_at: float = 0.0  # monotonic seconds: when the last fault really began
    left_open: list[asyncio.StreamWriter] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fault:
    """`deaths`: of children, that it means. `drops`: connections may end with it."""

    name: str
    inject: Callable[[Target], Awaitable[None]]
    deaths: int = 0
    drops: bool = False


def _child(target: Target, role: str) -> psutil.Process:
    """The endpoint, or any worker. Raises RuntimeError when there is none."""
    pid = target.daemon.pid
    found = [process for name, process in children_by_role(pid).items() if name.startswith(role)]
    if not found:
        raise RuntimeError(f"no {role} below {pid}")
    return target.rng.choice(found)


def _strike(target: Target, process: psutil.Process, number: int) -> None:
    """The fault begins now: finding the process took its time."""
    target.struck_at = time.monotonic()
    process.send_signal(number)


def _kill(role: str) -> Callable[[Target], Awaitable[None]]:
    async def inject(target: Target) -> None:
        _strike(target, _child(target, role), signal.SIGKILL)

    return inject


def _pause(role: str) -> Callable[[Target], Awaitable[None]]:
    async def inject(target: Target) -> None:
        process = _child(target, role)
        _strike(target, process, signal.SIGSTOP)
        await asyncio.sleep(PAUSE_S)
        process.send_signal(signal.SIGCONT)

    return inject


async def _hang(target: Target) -> None:
    """Stop a worker for good: its watchdog has to end it."""
    process = _child(target, "worker")
    _strike(target, process, signal.SIGSTOP)
    until = time.monotonic() + REPLACED_WITHIN_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            process.send_signal(signal.SIGCONT)
            raise RuntimeError(f"a stopped worker was not replaced within {REPLACED_WITHIN_S:.0f} s")
        await asyncio.sleep(0.02)


async def _reload(target: Target) -> None:
    os.kill(target.daemon.pid, signal.SIGHUP)


async def _half_open(target: Target) -> None:
    """Connections that begin a request and say no more; they stay until the end of the run."""
    for number in range(HALF_OPEN):
        writer = (await asyncio.open_connection(HOST, target.daemon.port))[1]
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"[: 10 + number]
        )
        target.left_open.append(writer)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("worker-kill", _kill("worker"), deaths=1),
        Fault("worker-hang", _hang, deaths=1),
        Fault("worker-pause", _pause("worker")),
        Fault("endpoint-kill", _kill("endpoint"), deaths=1, drops=True),
        Fault("endpoint-pause", _pause("endpoint")),
        Fault("reload", _reload),
        Fault("half-open", _half_open),
    )
}


def handles_reload(pid: int) -> bool:
    """Whether SIGHUP means something else than death."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
