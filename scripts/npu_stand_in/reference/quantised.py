"""Linear layers of int8 weights, and how activations become int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_stand_in.reference.registry import (
    FLOATS,
    HALVES,
    computes,
    numbered_type,
    require,
    require_defaults,
    require_type,
)

_WIDEST = 65535


@computes("npu_quantize")
def quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """input / scales or, without div_mode, input * scales; plus zero_points, rounded to int8."""
    name = "npu_quantize"
    require_type(name, "input", input, *FLOATS)
    require(
        name,
        numbered_type(name, dtype) in (torch.qint8, torch.int8),
        f"type number {dtype}: qint8 is modelled",
    )
    require(name, axis in (-1, input.dim() - 1), f"axis {axis}: the last one is modelled")
    require(name, scales.dim() == 1 and scales.shape[0] in (1, input.shape[-1]), "scales are [1] or [K]")
    if zero_points is not None and not div_mode:
        same = zero_points.shape == scales.shape and zero_points.dtype == scales.dtype
        require(name, same, "zero_points have the shape and the type of scales")
    scaled = input.float() / scales.float() if div_mode else input.float() * scales.float()
    return _int8(scaled if zero_points is None else scaled + zero_points.float())


@computes("npu_dynamic_quant")
def dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None = None,
    quant_mode: str = "pertoken",
    dst_type: int | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """-> int8, and float32 of the shape without its last dimension."""
    name = "npu_dynamic_quant"
    require_type(name, "input", input, *HALVES)
    require(name, quant_mode == "pertoken", f"quant_mode {quant_mode!r}: pertoken is modelled")
    require_defaults(name, other)
    require(name, numbered_type(name, dst_type) in (None, torch.int8), "only int8 is modelled")
    wide = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    scale = wide.abs().amax(-1) / 127
    return _int8(wide / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)), scale


@computes("npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **other: Any,
) -> Tensor:
    """x1: int8 [M, K]; x2: int8 [K, N]; scale: [1] or [N]; pertoken_scale: [M]; bias: [N]."""
    name = "npu_quant_matmul"
    require_defaults(name, {"offset": offset, **other})
    require_type(name, "x1", x1, torch.int8)
    require_type(name, "x2", x2, torch.int8)
    require(name, max(x1.shape[-1], x2.shape[-1]) <= _WIDEST, f"the last dimensions are at most {_WIDEST}")
    require(name, scale.dim() == 1 and scale.shape[0] in (1, x2.shape[-1]), "scale is [1] or [N]")
    to = numbered_type(name, output_dtype) or torch.int8
    if pertoken_scale is None:
        allowed = (
            (torch.float32, torch.bfloat16, torch.int64)
            if to == torch.bfloat16
            else (torch.int64, torch.float32)
        )
        require_type(name, "scale", scale, *allowed)
    else:
        require_type(name, "pertoken_scale", pertoken_scale, torch.float32)
        require_type(name, "scale", scale, torch.float32, torch.bfloat16)
        require(name, pertoken_scale.shape == x1.shape[:1], "pertoken_scale is [M]")
        require(name, to in HALVES, "with pertoken_scale the result is float16 or bfloat16")
    sums = x1.int() @ x2.int()
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    result = sums.float() * _multiplier(scale)
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        require_type(name, "bias", bias, torch.float32, torch.bfloat16, torch.float16)
        result = result + bias.float()
    return _int8(result) if to == torch.int8 else result.to(to)


def _multiplier(scale: Tensor) -> Tensor:
    """Of type int64 it is the bits of a float32, in the lower half."""
    return scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale.float()


@computes("npu_trans_quant_param")
def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """float32 -> the int64 that `npu_quant_matmul` takes for results in float16."""
    require(
        "npu_trans_quant_param", offset is None and round_mode == 0, "offset and round_mode are not modelled"
    )
    return scale.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF


@computes("npu_weight_quant_batchmatmul")
def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x: [M, K]; weight: int8 [K, N]; antiquant_scale, antiquant_offset: [1] or [N] -> [M, N]."""
    name = "npu_weight_quant_batchmatmul"
    del inner_precise
    plain = quant_scale is None and quant_offset is None and weight_dtype is None
    require(name, plain, "a quantised result is not modelled")
    require(name, antiquant_group_size == 0, "groups are not modelled")
    require_type(name, "x", x, *HALVES)
    require_type(name, "weight", weight, torch.int8)
    require_type(name, "antiquant_scale", antiquant_scale, x.dtype)
    wide = weight.float()
    if antiquant_offset is not None:
        require_type(name, "antiquant_offset", antiquant_offset, x.dtype)
        wide = wide + antiquant_offset.float()
    result = x.float() @ (wide * antiquant_scale.float())
    if bias is not None:
        require_type(name, "bias", bias, torch.float32 if x.dtype == torch.bfloat16 else torch.float16)
        require(name, bias.is_contiguous(), "bias must be contiguous")
        result = result + bias.float()
    return result.to(x.dtype)


def _int8(x: Tensor) -> Tensor:
    """Rounded to the nearest, halves to even."""
    return x.round().clamp_(-128, 127).to(torch.int8)
