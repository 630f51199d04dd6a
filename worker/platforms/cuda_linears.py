"""Linear layers on NVIDIA GPUs whose weights are int8, by Triton, or fp8, by torch's own product."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from worker.attention.triton_paged import power_of_two
from worker.layers.linear import PlainLinear
from worker.layers.quantized import W8A16, QuantisedWeight, W8A8Dynamic, W8A8Static
from worker.platforms.base import Linear
from worker.platforms.cuda_row_ops import warps_for

_SIZE = 1024  # numbers of a program of an elementwise kernel
_FEW_ROWS, _MANY_ROWS = 16, 64  # of a tile; the least that a matrix unit takes, and what keeps it busy
_FP8_ALIGNMENT = 16  # of both sizes of a weight
_FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantised_linear(given: QuantisedWeight, dtype: torch.dtype, device: torch.device) -> Linear:
    """`given` on `device`, taking and giving `dtype`."""
    match given:
        case W8A8Static():
            return CudaW8A8StaticLinear(given, dtype, device)
        case W8A8Dynamic():
            return CudaW8A8Linear(given, dtype, device)
        case W8A16():
            return CudaW8A16Linear(given, dtype, device)


def fp8_linear(weight: Tensor, bias: Tensor | None, device: torch.device) -> Linear:
    """weight: [out, in], of 16 bits, rounded to fp8 with a scale for each output; bias: [out].

    For chips of compute capability 8.9 and above. A weight of sizes the product cannot take stays as it is.
    """
    if any(size % _FP8_ALIGNMENT for size in weight.shape):
        return PlainLinear(weight.to(device), None if bias is None else bias.to(device))
    return CudaFp8Linear(weight, bias, device)


class _Quantiser:
    """Rows of activations as int8 or fp8."""

    def __init__(self, dtype: torch.dtype, largest: float) -> None:
        self._kernels: Any = importlib.import_module("worker.platforms.cuda_kernels")
        self._dtype = dtype
        self._largest = largest

    def by_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [rows, in] -> the same in few bits, and the scale of each row, float32 [rows]."""
        rows, width = x.shape
        q = torch.empty((rows, width), dtype=self._dtype, device=x.device)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        padded = power_of_two(width)
        self._kernels.quantise_rows_kernel[rows,](
            x.contiguous(), q, scales, width, padded, self._largest, num_warps=warps_for(padded)
        )
        return q, scales

    def by_constants(self, x: Tensor, scale: float, offset: float) -> Tensor:
        """x: [rows, in] -> the same in few bits."""
        q = torch.empty(x.shape, dtype=self._dtype, device=x.device)
        count = x.numel()
        self._kernels.quantise_kernel[-(-count // _SIZE),](x.contiguous(), q, scale, offset, count, _SIZE)
        return q


class _Int8Weight:
    """A weight on the device, and the product with it, whose epilogue scales."""

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        *,
        zero_points: Tensor | None = None,
        sums: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """The tensors are those of `product_kernel`; `dtype`: of the results."""
        self._kernels: Any = importlib.import_module("worker.platforms.cuda_kernels")
        self._weight = weight.contiguous().to(device)
        self._zero_points, self._sums, self._scales, self._bias = (
            None if tensor is None else tensor.contiguous().to(device)
            for tensor in (zero_points, sums, scales, bias)
        )
        self._dtype = dtype

    def product(self, x: Tensor, row_scales: Tensor | None = None) -> Tensor:
        """x: [rows, in], dense -> [rows, out]."""
        rows, inputs = x.shape
        outputs = len(self._weight)
        y = torch.empty((rows, outputs), dtype=self._dtype, device=x.device)
        tile_rows = _FEW_ROWS if rows <= _FEW_ROWS else _MANY_ROWS
        tile_outputs = 64
        grid = -(-outputs // tile_outputs), -(-rows // tile_rows)
        self._kernels.product_kernel[grid](
            x, self._weight, y, self._zero_points, self._sums, self._scales, row_scales, self._bias,
            rows, outputs, inputs, tile_rows, tile_outputs, 64,
            num_warps=4,
        )  # fmt: skip
        return y


class CudaW8A8StaticLinear:
    """Activations quantised with the constants of a calibration; what lies beyond them is cut off."""

    def __init__(self, given: W8A8Static, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = _Int8Weight(given.weight, given.deq_scale, dtype, device, sums=given.quant_bias)
        self._quantiser = _Quantiser(torch.int8, 127.0)
        self._constants = float(given.input_scale), float(given.input_offset)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        return self._weight.product(self._quantiser.by_constants(x, *self._constants))


class CudaW8A8Linear:
    """Activations quantised row by row, each with its own scale."""

    def __init__(self, given: W8A8Dynamic, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = _Int8Weight(given.weight, given.scale, dtype, device, bias=given.bias)
        self._quantiser = _Quantiser(torch.int8, 127.0)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        return self._weight.product(*self._quantiser.by_rows(x))


class CudaW8A16Linear:
    """Weights widened on the way into the product."""

    def __init__(self, given: W8A16, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = _Int8Weight(
            given.weight, given.scale, dtype, device, zero_points=given.offset, bias=given.bias
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        return self._weight.product(x.contiguous())


class CudaFp8Linear:
    """Both operands in fp8 (e4m3), with a scale for each row and each output."""

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        wide = weight.to(device).float()
        scales = wide.abs().amax(dim=1).div_(_FP8_LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        self._weight = (wide / scales[:, None]).clamp_(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn)
        self._scales = scales[None]
        self._bias = None if bias is None else bias.to(device)
        self._quantiser = _Quantiser(torch.float8_e4m3fn, _FP8_LARGEST)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        q, row_scales = self._quantiser.by_rows(x)
        # scales by row end in bfloat16 and nothing else
        y: Tensor = torch._scaled_mm(
            q,
            self._weight.t(),
            scale_a=row_scales[:, None],
            scale_b=self._scales,
            out_dtype=torch.bfloat16,
        )
        y = y.to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)
