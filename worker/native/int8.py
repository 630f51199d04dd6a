"""Linear layers of int8 weights and activations: the compiled kernel, or its twin out of torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from worker.native.layout import dense_from_panels, to_panels
from worker.native.library import IS_BF16, WEIGHTS_S8, Kernels, LinearStruct, kernels

_GROUP = 4  # inputs that lie together


class PackedInt8:
    """An int8 weight laid out for the kernel, or as it was where there is none."""

    def __init__(self, weight: Tensor, with_kernels: Kernels | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.kernels = with_kernels
        self.sums = weight.sum(1, dtype=torch.int32)
        self.data = to_panels(weight, _GROUP) if with_kernels else weight.contiguous()
        self.struct = LinearStruct(
            weight=self.data.data_ptr(),
            sums=self.sums.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            weights=WEIGHTS_S8,
        )

    def dense(self) -> Tensor:
        """int8 [out, in]; a copy where it was laid out anew."""
        if self.kernels is None:
            return self.data
        return dense_from_panels(self.data, self.out_features, self.in_features)


def pack_w8a8(weight: Tensor) -> PackedInt8:
    """weight: int8 [out, in], which the caller may drop."""
    return PackedInt8(weight, kernels())


def w8a8_linear(
    x: Tensor,
    packed: PackedInt8,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    input_offset: int = 0,
) -> Tensor:
    """x: float32 or bfloat16 [rows, in] -> x times the weight plus the bias, [rows, out] in x's dtype.

    weight_scale: float32 [out], contiguous; bias: the same, or None.

    Rows are quantised to the nearest of 255 steps, the largest value of a row being 127 (dynamic); with an
    `input_scale` to round(x / input_scale) + input_offset within -128..127 (static). Products are added up
    exactly, so a row's bits do not depend on the other rows. A row that holds an infinity or a NaN has no
    scale of its own: its results are NaN.
    """
    if packed.kernels is None:
        return twin_of_w8a8_linear(x, packed, weight_scale, bias, input_scale, input_offset)
    if x.stride(-1) != 1:
        x = x.contiguous()
    struct = packed.struct
    struct.scale = weight_scale.data_ptr()
    struct.bias = None if bias is None else bias.data_ptr()
    struct.input_scale = input_scale or 0.0
    struct.input_offset = input_offset
    y = x.new_empty((x.shape[0], packed.out_features))
    if packed.kernels.linear(
        ctypes.addressof(struct), x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0], IS_BF16[x.dtype]
    ):
        raise MemoryError
    return y


def twin_of_w8a8_linear(
    x: Tensor,
    packed: PackedInt8,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    input_offset: int = 0,
) -> Tensor:
    """`w8a8_linear` out of torch operators, to the same bits."""
    wide = x.float()
    if input_scale is None:
        largest = wide.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST)
        scale = torch.where(largest.isfinite(), largest / 127, torch.nan)
        inverse = torch.full_like(largest, 127) / largest  # 127 / largest would round twice
        quantised = (wide * inverse).round().nan_to_num(0.0)
    else:
        scale = torch.full((len(x), 1), input_scale)
        inverse = 1 / torch.tensor(input_scale, dtype=torch.float32)
        shifted = (wide * inverse).round() + input_offset
        quantised = shifted.nan_to_num(-128.0).clamp(-128, 127)
    sums = torch._int_mm(quantised.to(torch.int8), packed.dense().t())
    result = (sums - input_offset * packed.sums).float() * (weight_scale * scale)
    return (result if bias is None else result + bias).to(x.dtype)


_SMALLEST = 1e-30  # a row of zeros has a scale too
