"""What the processes of a daemon take: memory, descriptors, threads, by role."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_YOUNG_S = 30.0  # helpers that live shorter, such as the fork for one trial of a grammar, are no footprint
_MEMORY = re.compile(r"^(VmRSS|RssShmem|Threads):\s+(\d+)", re.MULTILINE)
_PSS = re.compile(r"^Pss:\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process, or of all with the same role. Memory in bytes."""

    rss: int
    pss: int  # like rss, but pages that n processes share count as 1/n
    shared: int  # of rss: in /dev/shm
    descriptors: int
    threads: int

    @property
    def own(self) -> int:
        """Of rss: without /dev/shm, which is allocated at the start, but resident from its first use on."""
        return self.rss - self.shared

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.rss + other.rss,
            self.pss + other.pss,
            self.shared + other.shared,
            self.descriptors + other.descriptors,
            self.threads + other.threads,
        )


def footprint(pid: int) -> Footprint:
    """Raises OSError when the process is gone."""
    place = Path("/proc") / str(pid)
    status = {name: int(number) for name, number in _MEMORY.findall((place / "status").read_text())}
    pss = _PSS.search((place / "smaps_rollup").read_text())
    if "VmRSS" not in status or pss is None:
        raise ProcessLookupError(f"process {pid} has ended")
    return Footprint(
        rss=status["VmRSS"] << 10,
        pss=int(pss[1]) << 10,
        shared=status["RssShmem"] << 10,
        descriptors=len(os.listdir(place / "fd")),
        threads=status["Threads"],
    )


def children_by_role(daemon_pid: int) -> dict[str, psutil.Process]:
    """The daemon's direct children: `endpoint`, which listens, and `worker 0`, `worker 1`, ..."""
    children = [child for child in psutil.Process(daemon_pid).children() if _is_there(child)]
    children.sort(key=lambda child: child.pid)
    endpoint = next((child for child in children if _listens(child)), None)
    workers = [child for child in children if child != endpoint]
    found = {f"worker {number}": worker for number, worker in enumerate(workers)}
    return found if endpoint is None else {"endpoint": endpoint, **found}


def footprints(daemon_pid: int) -> dict[str, Footprint]:
    """Role -> what its processes take now; helpers of the endpoint and of workers count for themselves."""
    found: dict[str, Footprint] = {}
    for role, process in _processes(daemon_pid):
        with contextlib.suppress(OSError, psutil.Error):
            taken = footprint(process.pid)
            found[role] = found[role] + taken if role in found else taken
    return found


def _processes(daemon_pid: int) -> Iterator[tuple[str, psutil.Process]]:
    yield "parent", psutil.Process(daemon_pid)
    for role, child in children_by_role(daemon_pid).items():
        yield role, child
        with contextlib.suppress(psutil.Error):
            helpers = sorted(child.children(recursive=True), key=lambda helper: helper.create_time())
            lasting = [helper for helper in helpers if time.time() - helper.create_time() > _YOUNG_S]
            for number, helper in enumerate(lasting, 1):
                sandbox = any("grammar_sandbox" in part for part in helper.cmdline())
                yield "grammar sandbox" if sandbox else f"helper {number} of {role}", helper


def _is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _listens(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(link.status == psutil.CONN_LISTEN for link in process.net_connections("tcp"))
    return False


def shared_memory_in_use() -> int:
    """Bytes of the whole /dev/shm in use, unlinked files included."""
    now = os.statvfs("/dev/shm")
    return (now.f_blocks - now.f_bfree) * now.f_frsize
