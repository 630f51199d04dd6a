"""Which kernels run a linear layer best on this machine, found by running them.

Machines that look alike differ: a bfloat16 product ran at half the float32 rate on one and at seven times it
on another. The probe takes some tens of milliseconds per dtype.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from worker.layers.linear import Float32Scratch, PackedLinear, PlainLinear, UpcastingLinear
from worker.native import NativeLinear, kernels

log = logging.getLogger("llm.platform")

_SHAPE = (2048, 1024)
_DECODE_ROWS = (1, 8)
_PREFILL_ROWS = 512
# steps of each size in a service with short prompts: what is gained here may be lost there
_STEPS = {1: 16.0, 8: 16.0, _PREFILL_ROWS: 0.5}

Native = Literal["", "float32", "dot"]


@dataclass(frozen=True, slots=True)
class LinearKernels:
    packed: bool  # oneDNN's packed weights
    upcast: bool  # float32 products for long prefills
    native: Native = ""  # instead of both, our own: the arithmetic they use

    def __str__(self) -> str:
        if self.native:
            return f"compiled here, by {_ARITHMETIC[self.native]}"
        return ("packed" if self.packed else "plain") + (", long prefills in float32" if self.upcast else "")


_ARITHMETIC = {"float32": "float32 products", "dot": "bfloat16 dot products"}


def probe_linears(dtype: torch.dtype) -> LinearKernels:
    weight = torch.full(_SHAPE, 0.01, dtype=dtype)
    plain = PlainLinear(weight, None)
    packed = _packed_if_faster(plain, weight)
    upcast = dtype is not torch.float32 and _upcasting_is_faster(packed or plain, dtype)
    torch_best = UpcastingLinear(packed or plain, Float32Scratch()) if upcast else packed or plain
    return LinearKernels(packed is not None, upcast, _native_if_faster(torch_best, weight))


def _packed_if_faster(plain: PlainLinear, weight: Tensor) -> PackedLinear | None:
    """None also when this torch lacks the kernel."""
    inputs = [torch.ones(rows, _SHAPE[1], dtype=weight.dtype) for rows in _DECODE_ROWS]
    try:
        packed = PackedLinear(weight, None)
        packed_s = sum(fastest(packed, x, tries=20) for x in inputs)
    except (AttributeError, RuntimeError) as error:
        log.info("packed %s linears are not available here: %s", weight.dtype, error)
        return None
    plain_s = sum(fastest(plain, x, tries=20) for x in inputs)
    return packed if packed_s <= plain_s * 1.05 else None


def _native_if_faster(torch_best: Callable[[Tensor], Tensor], weight: Tensor) -> Native:
    """One kernel for all numbers of rows: its layout is another, and no weight is kept twice.

    Unless torch's are much faster, as with matrix instructions that ours lack: the order of our sums does not
    depend on the batch, and a choice that hangs on noise would change answers with each start.
    """
    compiled = kernels()
    if compiled is None or weight.dtype not in _NATIVE:
        return ""
    ways = [way for way in _NATIVE[weight.dtype] if way != "dot" or compiled.has_bf16_dot]
    ours = [NativeLinear(weight, None, compiled, dot=way == "dot") for way in ways]
    *times, of_torch = steps_take([*ours, torch_best], _SHAPE[1], weight.dtype)
    best = min(range(len(ways)), key=lambda index: times[index])
    much = 1.5 if has_matrix_instructions() and compiled.name != b"amx" else 3.0
    return ways[best] if times[best] <= much * of_torch else ""


def has_matrix_instructions() -> bool:
    """Whether torch may have kernels that leave ours behind; where it has none, noise must not decide."""
    if platform.machine() != "x86_64":
        return True
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


_NATIVE: dict[torch.dtype, tuple[Native, ...]] = {
    torch.float32: ("float32",),
    torch.bfloat16: ("dot", "float32"),
}


def _upcasting_is_faster(narrow: PlainLinear | PackedLinear, dtype: torch.dtype) -> bool:
    x = torch.ones(_PREFILL_ROWS, _SHAPE[1], dtype=dtype)
    upcasting = UpcastingLinear(narrow, Float32Scratch())
    return fastest(upcasting, x, tries=4) < 0.9 * fastest(narrow, x, tries=4)


def steps_take(
    runs: Sequence[Callable[[Tensor], Tensor]], in_features: int, dtype: torch.dtype
) -> list[float]:
    """Seconds of the steps in `_STEPS` for each of `runs`, which take turns: other work comes in slices."""
    inputs = {rows: torch.ones(rows, in_features, dtype=dtype) for rows in _STEPS}
    best = [dict.fromkeys(_STEPS, math.inf) for _ in runs]
    for _ in range(_TURNS):
        for run, seconds in zip(runs, best, strict=True):
            for rows, x in inputs.items():
                tries = 1 if rows == _PREFILL_ROWS else 5
                seconds[rows] = min(seconds[rows], fastest(run, x, tries))
    return [sum(_STEPS[rows] * seconds[rows] for rows in _STEPS) for seconds in best]


_TURNS = 6


def fastest(run: Callable[[Tensor], Tensor], x: Tensor, tries: int) -> float:
    """Seconds of the fastest run: other work on the machine only ever adds."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - begin)
    return min(times)
