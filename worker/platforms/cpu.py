"""The CPU platform: threads, memory limits of the container, and which linear kernel this machine runs best.

Which product is fast differs between machines that look alike (a bfloat16 product ran at half the float32 rate on one and
at seven times it on another), so everything is decided by a probe of some tens of milliseconds.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from worker.layers.linear import PackedLinear, PlainLinear
from worker.platforms.base import DTypeName, Linear, MemoryInfo

logger = logging.getLogger(__name__)

_KV_SHARE = 0.25  # of the available memory, over all workers, when npuMemSize is -1
_PROBE_SHAPE = (2048, 1024)
_PROBE_ROWS = (1, 8)  # decode; at prefill sizes both kernels do the same work
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuPlatform:
    name = "cpu"
    attention_backend = "cpu_paged"

    def __init__(self) -> None:
        self._packs: dict[torch.dtype, bool] = {}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def set_up(self, device_id: int, num_workers: int, threads: int) -> None:
        """`device_id` is only a slot number here."""
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads or max(1, cores // num_workers))

    def weight_dtype(self, requested: DTypeName, checkpoint: torch.dtype) -> torch.dtype:
        dtype = checkpoint if requested == "auto" else _DTYPES[requested]
        # float16 products are emulated on most CPUs, and overflow where float32 does not
        return torch.float32 if dtype is torch.float16 else dtype

    def memory(self) -> MemoryInfo:
        return read_memory(Path("/"))

    def kv_budget(self, num_workers: int) -> int:
        return int(self.memory().available * _KV_SHARE) // num_workers

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self._packing_pays(weight.dtype):
            return PackedLinear(weight, bias)
        return PlainLinear(weight, bias)

    def describe(self) -> str:
        kernels = ", ".join(f"{str(k)[6:]} {'packed' if v else 'plain'}" for k, v in self._packs.items())
        return f"cpu, {torch.get_num_threads()} threads, linears: {kernels or 'not probed'}"

    def _packing_pays(self, dtype: torch.dtype) -> bool:
        if dtype not in self._packs:
            self._packs[dtype] = probe_packing(dtype)
        return self._packs[dtype]


def probe_packing(dtype: torch.dtype) -> bool:
    """Whether the packed kernel exists here and is not slower than the plain one."""
    weight = torch.full(_PROBE_SHAPE, 0.01, dtype=dtype)
    try:
        packed = PackedLinear(weight, None)
        inputs = [torch.ones(rows, _PROBE_SHAPE[1], dtype=dtype) for rows in _PROBE_ROWS]
        packed_s = sum(_best_of(lambda x=x: packed(x)) for x in inputs)  # type: ignore[misc]
    except (AttributeError, RuntimeError) as error:
        logger.info("packed %s linears are not available here: %s", dtype, error)
        return False
    plain = PlainLinear(weight, None)
    plain_s = sum(_best_of(lambda x=x: plain(x)) for x in inputs)  # type: ignore[misc]
    return packed_s <= plain_s * 1.05


def _best_of(run: Callable[[], Tensor], tries: int = 20) -> float:
    """Seconds of the fastest run: other work on the machine only ever adds."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


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
