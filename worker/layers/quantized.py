"""Linear layers whose weights are int8, with a scale for each output.

The names of the parts and the arithmetic are those of engine/quantisation.py. Products of int8 numbers are
exact, everything else happens to each row by itself: a row's bits never depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from worker.layers.linear import Scratch

Int8Product = Callable[[Tensor, Tensor], Tensor]  # see worker/layers/int8_product.py

_LEAST = torch.finfo(torch.float32).tiny  # instead of the scale of a row of zeros


@dataclass(frozen=True, slots=True)
class W8A8Static:
    """A layer, or several with the same input scale merged. All on the CPU."""

    weight: Tensor  # int8 [out, in]
    input_scale: float
    input_offset: float
    quant_bias: Tensor  # int32 [out]
    deq_scale: Tensor  # float32 [out]


@dataclass(frozen=True, slots=True)
class W8A8Dynamic:
    weight: Tensor  # int8 [out, in]
    scale: Tensor  # float32 [out]
    bias: Tensor | None  # float32 [out]


@dataclass(frozen=True, slots=True)
class W8A16:
    weight: Tensor  # int8 [out, in]
    scale: Tensor  # float32 [out]
    offset: Tensor | None  # float32 [out]; None: all zero
    bias: Tensor | None  # float32 [out]

    def dense(self) -> Tensor:
        """The weight it stands for, float32 [out, in]."""
        weight = self.weight.float()
        if self.offset is not None:
            weight.sub_(self.offset[:, None])
        return weight.mul_(self.scale[:, None])


QuantisedWeight = W8A8Static | W8A8Dynamic | W8A16


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., n] -> int8 of its shape, float32 [...]: x is about int8 * scale, the largest of a row 127."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).div_(127).clamp_min_(_LEAST)
    return (wide / scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), scale


class W8A8StaticLinear:
    """Activations quantised with the constants of a calibration; what lies beyond them is cut off."""

    def __init__(self, given: W8A8Static, product: Int8Product) -> None:
        self._given = given
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        given = self._given
        steps = x.float() / given.input_scale
        q = steps.add_(given.input_offset).round_().clamp_(-128, 127)
        sums = self._product(q.to(torch.int8), given.weight).add_(given.quant_bias)
        return sums.float().mul_(given.deq_scale).to(x.dtype)


class W8A8Linear:
    """Activations quantised row by row, each with its own scale."""

    def __init__(self, given: W8A8Dynamic, product: Int8Product) -> None:
        self._given = given
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        given = self._given
        q, row_scale = quantise_rows(x)
        # scales one after the other: fused, a product may be rounded once or twice, as its place has it
        y = self._product(q, given.weight).float().mul_(given.scale).mul_(row_scale[:, None])
        if given.bias is not None:
            y.add_(given.bias)
        return y.to(x.dtype)


class W8A16Linear:
    """Weights as whole numbers in x's dtype, which holds them exactly; results are scaled.

    Up to `few_rows` by torch's own kernel, which converts on the way and reads bytes; beyond, converting
    once for all rows is cheaper. Both round once before the scale, in another order of summation.
    """

    def __init__(self, given: W8A16, scratch: Scratch, few_rows: int) -> None:
        """`scratch`: of the dtype x will have."""
        self._given = given
        self._scratch = scratch
        self._few_rows = few_rows if given.offset is None else 0
        self._ones = torch.ones(len(given.weight), dtype=scratch.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        given = self._given
        if len(x) <= self._few_rows:
            y = int8_weight_product(x, given.weight, self._ones)
        else:
            weight = self._scratch.hold(given.weight)
            if given.offset is not None:
                weight.sub_(given.offset[:, None])  # whole numbers below 256 still
            y = functional.linear(x, weight)
        y = y.float().mul_(given.scale)
        if given.bias is not None:
            y.add_(given.bias)
        return y.to(x.dtype)


def int8_weight_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x: [rows, in]; weight: int8 [out, in]; scale: [out], of x's dtype -> [rows, out].

    The operator is private to torch: the platform probes it before it builds any layer.
    """
    return torch._weight_int8pack_mm(x, weight, scale)


class SideBySide:
    """Layers with the same input that could not be merged into one."""

    def __init__(self, parts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, sum of outs]."""
        return torch.cat([part(x) for part in self._parts], dim=-1)
