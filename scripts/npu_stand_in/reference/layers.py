"""Norms, rotary positions, the gated activation, and the cast to another memory format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from npu_stand_in.reference.registry import FLOATS, computes, require, require_type


@computes("npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """-> y, 1 / root mean square in float32."""
    require_type("npu_rms_norm", "input", input, *FLOATS)
    require(
        "npu_rms_norm",
        gamma.shape == input.shape[-gamma.dim() :],
        "gamma must have the last dimensions of input",
    )
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


@computes("npu_add_rms_norm")
def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, 1 / root mean square, x1 + x2."""
    require(
        "npu_add_rms_norm", x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 must be of one kind"
    )
    total = x1 + x2
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


@computes("npu_add_rms_norm_v2")
def add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The same in place: x1 becomes y, x2 the sum. -> 1 / root mean square."""
    y, rstd, total = add_rms_norm(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(total)
    return rstd


@computes("npu_swiglu")
def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    require("npu_swiglu", input.shape[dim] % 2 == 0, "the split dimension must be even")
    gate, up = input.float().chunk(2, dim)
    return (functional.silu(gate) * up).to(input.dtype)


def _turned(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    wide = x.float()
    return (wide * cos.float() + _turned(wide, mode) * sin.float()).to(x.dtype)


@computes("npu_rotary_mul")
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """input: [B, S, N, D], in either order of S and N; r1, r2: cosine and sine, broadcast to it."""
    name = "npu_rotary_mul"
    require(name, input.dim() == r1.dim() == r2.dim() == 4, "all three have four dimensions")
    require(name, rotary_mode in ("half", "interleave"), f"rotary_mode {rotary_mode!r} is half or interleave")
    require(name, rotate is None, "a matrix `rotate` is not modelled")
    width = input.shape[-1]
    require(name, width % 2 == 0 and width < 896, f"D = {width} must be even and below 896")
    require(name, r1.shape == r2.shape and r1.shape[-1] == width, "r1 and r2 have the width D, both halves")
    require(name, input.shape[0] < 1000 and min(input.shape[1:3]) < 1000, "B and N are below 1000")
    return _rotated(input, r1, r2, rotary_mode)


@computes("npu_apply_rotary_pos_emb")
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """query, key: [B, S, N, D], or [T, N, D] in the layout TND; both are changed in place."""
    name = "npu_apply_rotary_pos_emb"
    tensors = (query, key, cos, sin)
    require(name, layout in ("BSND", "TND"), f"layout {layout!r} is BSND or TND")
    require(name, rotary_mode == "half", f"rotary_mode {rotary_mode!r} is half")
    dims = 4 if layout == "BSND" else 3
    require(name, all(tensor.dim() == dims for tensor in tensors), f"in {layout} all have {dims} dimensions")
    require(name, len({tensor.dtype for tensor in tensors}) == 1, "all have one type")
    require(name, all(t.shape[:-2] == query.shape[:-2] for t in tensors), "B and S, or T, are equal in all")
    require(name, query.shape[-1] == key.shape[-1] and query.shape[-1] in (64, 128), "D is 64 or 128")
    require(name, cos.shape == sin.shape and cos.shape[-2] == 1, "cos and sin have one head")
    require(
        name, cos.shape[-1] in (64, 128) and cos.shape[-1] == query.shape[-1], "cos and sin have the width D"
    )
    query.copy_(_rotated(query, cos, sin, rotary_mode))
    key.copy_(_rotated(key, cos, sin, rotary_mode))
    return query, key


@computes("npu_mrope")
def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    """positions: [T]; query, key: [T, N * head_size]; cos_sin_cache: D / 2 cosines, then sines, each."""
    name = "npu_mrope"
    require(
        name,
        positions.dim() == 1 and not any(mrope_section or ()),
        "several kinds of positions are not modelled",
    )
    require(
        name,
        rotary_mode == "half" and cache_mode == "default",
        "other modes than half and default are not modelled",
    )
    require_type(name, "positions", positions, torch.int32, torch.int64)
    for label, tensor in (("query", query), ("key", key), ("cos_sin_cache", cos_sin_cache)):
        require_type(name, label, tensor, *FLOATS)
        require(
            name,
            tensor.dim() == 2 and tensor.dtype == query.dtype,
            f"{label} has two dimensions, all one type",
        )
    granule = 16 if query.dtype == torch.float32 else 32
    width = cos_sin_cache.shape[1]
    require(name, width == head_size, f"{width} rotated of {head_size} dimensions: all are modelled")
    require(
        name, width % granule == 0, f"{width} rotated dimensions of {query.dtype} are a multiple of {granule}"
    )
    require(
        name,
        not len(positions) or 0 <= int(positions.min()) <= int(positions.max()) < len(cos_sin_cache),
        "positions are rows of cos_sin_cache",
    )
    cos, sin = (half.repeat(1, 2).unsqueeze(1) for half in cos_sin_cache[positions.long()].chunk(2, -1))
    rotated = (_rotated(x.view(len(x), -1, head_size), cos, sin, "half").flatten(1) for x in (query, key))
    return next(rotated), next(rotated)


@computes("npu_format_cast")
def format_cast(
    input: Tensor, acl_format: int, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The numbers stay as they are; in which order the chip has them in memory is not modelled."""
    del customize_dtype, input_dtype
    fractal_nz = 29
    require(
        "npu_format_cast",
        acl_format != fractal_nz or input.dtype in (torch.int8, torch.float16, torch.bfloat16),
        f"FRACTAL_NZ is for int8, float16 and bfloat16, not {input.dtype}",
    )
    return input.clone()
