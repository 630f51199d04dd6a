"""What a decoder does to each token between its products, one Triton kernel for each.

Queries and keys are rotated by the attention, on the way into the cache, but where a family has its own way.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from worker.attention.triton_paged import power_of_two
from worker.layers.row_ops import RotatesTogether

_SIZE = 1024  # numbers of a program of an elementwise kernel


class CudaRowOps(RotatesTogether):
    """Rotates in place: queries and keys stay views of the product they came in."""

    def __init__(self) -> None:
        # here, so that nothing needs Triton before the device has been found
        self._kernels: Any = importlib.import_module("worker.platforms.cuda_kernels")

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.shape
        out = torch.empty_like(x)
        padded = power_of_two(width)
        self._kernels.add_rms_norm_kernel[rows,](
            x, delta, weight, out, eps, width, padded, num_warps=warps_for(padded)
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
        self._kernels.silu_mul_kernel[rows, -(-width // _SIZE)](gate_up, out, width, _SIZE)
        return out

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, _, head_dim = heads.shape
        self._kernels.rotate_kernel[tokens, count](
            heads, cos, sin, heads.stride(0), head_dim, power_of_two(head_dim // 2), num_warps=1
        )
        return heads[:, :count]


def warps_for(numbers: int) -> int:
    """Of a program that holds a whole row: some 16 numbers for each thread."""
    return min(16, max(1, numbers // 512))
