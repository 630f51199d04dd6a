"""Which kernels run layers of int8 weights on this machine, found by running them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from worker.layers.int8_product import int8_product, int8_product_in_float32
from worker.layers.linear import Scratch
from worker.layers.quantized import W8A16, Int8Product, W8A8Dynamic, W8A8Linear, W8A16Linear
from worker.native import NativeInt8Linear, kernels
from worker.platforms.base import Linear
from worker.platforms.cpu_kernels import fastest, steps_take

log = logging.getLogger("llm.platform")

_SHAPE = (2048, 1024)
_FEW_ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Int8Kernels:
    operator: bool  # torch's own product of int8 matrices
    few_rows: int  # w8a16: up to so many rows by torch's kernel for int8 weights
    native: bool = False  # w8a8: our own instead

    @property
    def product(self) -> Int8Product:
        return int8_product if self.operator else int8_product_in_float32

    def __str__(self) -> str:
        if self.native:
            return "compiled here"
        return "by torch" if self.operator else "in float32"


def probe_int8(dtype: torch.dtype) -> Int8Kernels:
    operator = _is_exact(int8_product)
    found = Int8Kernels(operator, _few_rows(dtype))
    if _native_is_faster(found.product, dtype):
        return replace(found, native=True)
    if not operator:
        log.warning("this torch has no exact product of int8 matrices here: float32 is used, which is slower")
    return found


def _is_exact(product: Int8Product) -> bool:
    """Also of the largest numbers: some instructions add pairs of products up in 16 bits, and saturate."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (3, 512), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (64, 512), dtype=torch.int8, generator=generator)
    q[0], weight[0], weight[1] = -128, -128, 127
    try:
        return torch.equal(product(q, weight), int8_product_in_float32(q, weight))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("the product of int8 matrices is not available here: %s", error)
        return False


def _native_is_faster(product: Int8Product, dtype: torch.dtype) -> bool:
    compiled = kernels()
    if compiled is None:
        return False
    given = W8A8Dynamic(torch.ones(_SHAPE, dtype=torch.int8), torch.ones(_SHAPE[0]), None)
    linears: list[Linear] = [NativeInt8Linear(given, compiled), W8A8Linear(given, product)]
    native, torchs = steps_take(linears, _SHAPE[1], dtype)
    return native <= torchs


def _few_rows(dtype: torch.dtype) -> int:
    given = W8A16(torch.ones(_SHAPE, dtype=torch.int8), torch.ones(_SHAPE[0]), None, None)
    converting = W8A16Linear(given, Scratch(dtype), 0)
    reading = W8A16Linear(given, Scratch(dtype), _FEW_ROWS[-1])
    few = 0
    for rows in _FEW_ROWS:
        x = torch.ones(rows, _SHAPE[1], dtype=dtype)
        try:
            if fastest(reading, x, tries=5) > fastest(converting, x, tries=5):
                break
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            log.info("the kernel for int8 weights is not available here: %s", error)
            break
        few = rows
    return few
