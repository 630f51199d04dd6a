"""Which kernels run a linear layer best on this machine, found by running them.

Machines that look alike differ: a bfloat16 product ran at half the float32 rate on one and at seven times it
on another. The probe takes some tens of milliseconds per dtype.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.layers.linear import Float32Scratch, PackedLinear, PlainLinear, UpcastingLinear

log = logging.getLogger("llm.platform")

_SHAPE = (2048, 1024)
_DECODE_ROWS = (1, 8)
_PREFILL_ROWS = 512


@dataclass(frozen=True, slots=True)
class LinearKernels:
    packed: bool  # oneDNN's packed weights
    upcast: bool  # float32 products for long prefills

    def __str__(self) -> str:
        return ("packed" if self.packed else "plain") + (", long prefills in float32" if self.upcast else "")


def probe_linears(dtype: torch.dtype) -> LinearKernels:
    weight = torch.full(_SHAPE, 0.01, dtype=dtype)
    plain = PlainLinear(weight, None)
    packed = _packed_if_faster(plain, weight)
    upcast = dtype is not torch.float32 and _upcasting_is_faster(packed or plain, dtype)
    return LinearKernels(packed is not None, upcast)


def _packed_if_faster(plain: PlainLinear, weight: Tensor) -> PackedLinear | None:
    """None also when this torch lacks the kernel."""
    inputs = [torch.ones(rows, _SHAPE[1], dtype=weight.dtype) for rows in _DECODE_ROWS]
    try:
        packed = PackedLinear(weight, None)
        packed_s = sum(_fastest(packed, x, tries=20) for x in inputs)
    except (AttributeError, RuntimeError) as error:
        log.info("packed %s linears are not available here: %s", weight.dtype, error)
        return None
    plain_s = sum(_fastest(plain, x, tries=20) for x in inputs)
    return packed if packed_s <= plain_s * 1.05 else None


def _upcasting_is_faster(narrow: PlainLinear | PackedLinear, dtype: torch.dtype) -> bool:
    x = torch.ones(_PREFILL_ROWS, _SHAPE[1], dtype=dtype)
    upcasting = UpcastingLinear(narrow, Float32Scratch())
    return _fastest(upcasting, x, tries=4) < 0.9 * _fastest(narrow, x, tries=4)


def _fastest(run: Callable[[Tensor], Tensor], x: Tensor, tries: int) -> float:
    """Seconds of the fastest run: other work on the machine only ever adds."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - begin)
    return min(times)
