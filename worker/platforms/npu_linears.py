"""Linear layers with the matrix products of torch_npu: plain, and of int8 weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.layers.quantized import (
    W8A16,
    QuantisedWeight,
    SideBySide,
    W8A8Dynamic,
    W8A8Static,
)
from worker.platforms.base import Linear

_FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ: tiles as the matrix unit reads them; the same numbers, read faster
_MAX_OUTPUTS = 65535  # of one quantised product


def quantised_linear(given: QuantisedWeight, dtype: torch.dtype, device: torch.device) -> Linear:
    """`given` on `device`, taking and giving `dtype`: in several products where one may not be so wide."""
    parts = [_one_product(part, dtype, device) for part in _narrow_parts(given)]
    return parts[0] if len(parts) == 1 else SideBySide(parts)


def _one_product(given: QuantisedWeight, dtype: torch.dtype, device: torch.device) -> Linear:
    match given:
        case W8A8Static():
            return NpuW8A8StaticLinear(given, dtype, device)
        case W8A8Dynamic():
            return NpuW8A8Linear(given, dtype, device)
        case W8A16():
            return NpuW8A16Linear(given, dtype, device)


def _narrow_parts(given: QuantisedWeight) -> Sequence[QuantisedWeight]:
    outputs = len(given.weight)
    count = -(-outputs // _MAX_OUTPUTS)
    if count == 1:
        return [given]
    size = -(-outputs // count)
    return [_outputs(given, slice(start, start + size)) for start in range(0, outputs, size)]


def _outputs(given: QuantisedWeight, part: slice) -> QuantisedWeight:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[part]

    match given:
        case W8A8Static(weight, scale, offset, quant_bias, deq_scale):
            return W8A8Static(weight[part], scale, offset, quant_bias[part], deq_scale[part])
        case W8A8Dynamic(weight, scales, bias):
            return W8A8Dynamic(weight[part], scales[part], cut(bias))
        case W8A16(weight, scales, offsets, bias):
            return W8A16(weight[part], scales[part], cut(offsets), cut(bias))


def _laid_out(weight: Tensor, device: torch.device) -> Tensor:
    """weight: int8 [out, in] -> [in, out] on the device, in tiles."""
    transposed = weight.t().contiguous().to(device)
    tiled: Tensor = torch.ops.npu.npu_format_cast(transposed, _FRACTAL_NZ)
    return tiled


class NpuW8A8StaticLinear:
    """Activations quantised with the constants of a calibration; what lies beyond them is cut off."""

    def __init__(self, given: W8A8Static, dtype: torch.dtype, device: torch.device) -> None:
        inputs = given.weight.shape[1]
        self._dtype = dtype
        self._weight = _laid_out(given.weight, device)
        self._inverse_scale = torch.full((inputs,), 1.0 / given.input_scale, dtype=dtype, device=device)
        self._offset = torch.full((inputs,), given.input_offset, dtype=dtype, device=device)
        self._bias = given.quant_bias.to(device)
        scale = given.deq_scale.to(device)
        # a product that ends in float16 takes its scales as the output unit reads them
        self._scale = torch.ops.npu.npu_trans_quant_param(scale) if dtype is torch.float16 else scale

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        q = torch.ops.npu.npu_quantize(
            x, self._inverse_scale, self._offset, torch.qint8, axis=-1, div_mode=False
        )
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q, self._weight, self._scale, bias=self._bias, output_dtype=self._dtype
        )
        return y


class NpuW8A8Linear:
    """Activations quantised row by row, each with its own scale."""

    def __init__(self, given: W8A8Dynamic, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._weight = _laid_out(given.weight, device)
        self._scale = given.scale.to(device)
        self._bias = None if given.bias is None else given.bias.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        q, row_scale = torch.ops.npu.npu_dynamic_quant(x)
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q,
            self._weight,
            self._scale,
            pertoken_scale=row_scale,
            bias=self._bias,
            output_dtype=self._dtype,
        )
        return y


class NpuW8A16Linear:
    """Weights widened on the way into the product."""

    def __init__(self, given: W8A16, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = _laid_out(given.weight, device)
        self._scale = given.scale.to(device, dtype)
        # the operator adds its offset to a weight, the checkpoint's is subtracted
        self._offset = None if given.offset is None else (-given.offset).to(device, dtype)
        bias_dtype = torch.float32 if dtype is torch.bfloat16 else dtype
        self._bias = None if given.bias is None else given.bias.to(device, bias_dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            x, self._weight, self._scale, antiquant_offset=self._offset, bias=self._bias
        )
        return y
