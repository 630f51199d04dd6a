"""Triton kernels of what happens to each row by itself, and of products with int8 weights."""

from __future__ import annotations

import triton
import triton.language as tl

from worker.attention.triton_kernels import scale_of, to_whole


@triton.jit
def add_rms_norm_kernel(x, delta, weight, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Grid: rows. `delta` None: x is normalised as it is."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    i = tl.arange(0, PADDED)
    inside = i < WIDTH
    values = tl.load(x + row + i, mask=inside, other=0.0)
    if delta is not None:
        # the sum is rounded before it is normalised: what the next layer adds to is what this one saw
        values = (values.to(tl.float32) + tl.load(delta + row + i, mask=inside, other=0.0).to(tl.float32)).to(
            x.dtype.element_ty
        )
        tl.store(x + row + i, values, mask=inside)
    wide = values.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = wide * factor * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + i, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def silu_mul_kernel(gate_up, out, width, SIZE: tl.constexpr):
    """Grid: (rows, pieces of SIZE of a row)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + i, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(heads, cos, sin, token_stride, D: tl.constexpr, HALF_PADDED: tl.constexpr):
    """Grid: (tokens, heads to rotate), in place. cos, sin: [tokens, D], the sign of a half in `sin`."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF_PADDED)
    inside = i < HALF
    at = heads + token * token_stride + tl.program_id(1) * D + i
    turn = token * D + i
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + turn + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + turn + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos_first + second * sin_first).to(heads.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * cos_second + first * sin_second).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def quantise_rows_kernel(x, out, scales, WIDTH: tl.constexpr, PADDED: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: rows. Into int8 or fp8, with the scale that makes the largest of a row LARGEST."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    wide = tl.load(x + row * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    scale = scale_of(wide, LARGEST)
    steps = tl.div_rn(wide, scale)
    if out.dtype.element_ty == tl.int8:
        steps = to_whole(steps)
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    tl.store(out + row * WIDTH + i, steps.to(out.dtype.element_ty), mask=i < WIDTH)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["count"])
def quantise_kernel(x, out, scale, offset, count, SIZE: tl.constexpr):
    """Grid: pieces of SIZE of all `count` numbers. Into int8 by the constants of a calibration."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    steps = tl.div_rn(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32), scale) + offset
    # what is cut off anyway must not be too large to be rounded
    steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
    tl.store(out + i, to_whole(steps).to(tl.int8), mask=i < count)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x, weight, out, zero_points, sums, scales, row_scales, bias, rows, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of outputs, tiles of rows). out = (x @ (weight - zero_points).T + sums) * scales + bias.

    x: [rows, inputs], int8 for exact sums in int32, or floating point; weight: int8 [outputs, inputs].
    zero_points, scales, bias: float32 [outputs]; sums: int32 [outputs]; row_scales: float32 [rows]. All of
    these but `scales` may be None.
    """
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row = m < rows
    is_output = n < outputs
    x_row = x + m.to(tl.int64)[:, None] * inputs
    weight_row = weight + n.to(tl.int64)[None, :] * inputs
    if zero_points is not None:
        zero = tl.load(zero_points + n, mask=is_output, other=0.0)
    if x.dtype.element_ty == tl.int8:
        total = tl.zeros([ROWS, OUTPUTS], tl.int32)
    else:
        total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS)
        a = tl.load(x_row + k[None, :], mask=is_row[:, None] & (k < inputs)[None, :], other=0)
        b = tl.load(weight_row + k[:, None], mask=is_output[None, :] & (k < inputs)[:, None], other=0)
        if x.dtype.element_ty == tl.int8:
            total += tl.dot(a, b, out_dtype=tl.int32)
        else:
            # whole numbers of up to 256, which every one of these types holds exactly
            whole = b.to(tl.float32)
            if zero_points is not None:
                whole -= zero[None, :]
            total += tl.dot(a, whole.to(a.dtype), input_precision="ieee")
    if sums is not None:
        total += tl.load(sums + n, mask=is_output, other=0)[None, :]
    y = total.to(tl.float32) * tl.load(scales + n, mask=is_output, other=0.0)[None, :]
    if row_scales is not None:
        y *= tl.load(row_scales + m, mask=is_row, other=0.0)[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=is_output, other=0.0)[None, :]
    at = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
