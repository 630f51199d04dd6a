"""How much memory this process may really have: the machine's, narrowed by its control groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes this process could still take, and bytes the device has at all."""

    available: int
    total: int


def read_memory(root: Path) -> MemoryInfo:
    """/proc/meminfo below `root`, narrowed by every memory limit of the control groups this process is in."""
    info = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(info["MemAvailable"].split()[0]) * 1024
    total = int(info["MemTotal"].split()[0]) * 1024
    for limit, used in _group_limits(root):
        available = min(available, max(0, limit - used))
        total = min(total, limit)
    return MemoryInfo(available, total)


def _group_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, unreclaimable use) in bytes of the process's memory group and its parents, cgroup v2 and v1."""
    found = []
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit_name, use_name = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit_name, use_name = (
                root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            )  # fmt: skip
        else:
            continue
        # inside a container the path may be the host's; then only the mount point itself exists
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = _read_int(folder / limit_name)
            if limit is not None:
                used = (_read_int(folder / use_name) or 0) - _page_cache(folder / "memory.stat")
                found.append((limit, max(0, used)))
            if folder == mount:
                break
    return found


def _read_int(file: Path) -> int | None:
    """None for a missing file and for the word "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _page_cache(stat: Path) -> int:
    """File pages the kernel drops before it runs out: they count as use but are free for the asking."""
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
