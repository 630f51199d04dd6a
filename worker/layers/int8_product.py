"""Products of int8 matrices, exact: whichever of these runs one, the result is the same to the bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from worker.layers.linear import fill_up

_EXACT = 1024  # products of two int8 numbers whose sum float32 holds exactly: 1024 * 128 * 128 = 2**24


def int8_product(q: Tensor, weight: Tensor) -> Tensor:
    """q: int8 [rows, in]; weight: int8 [out, in] -> int32 [rows, out].

    The operator is private to torch: the platform probes it before it builds any layer. As oneDNN keeps a
    kernel for each number of rows, these are filled up to few.
    """
    return torch._int_mm(fill_up(q), weight.t())[: q.shape[0]]


def int8_product_in_float32(q: Tensor, weight: Tensor) -> Tensor:
    """The same where torch has no operator for it: float32 sums, kept short enough to be exact."""
    out = torch.zeros(len(q), len(weight), dtype=torch.int32)
    for some, weights in zip(torch.split(q, _EXACT, 1), torch.split(weight, _EXACT, 1), strict=True):
        out += functional.linear(some.float(), weights.float()).int()
    return out
