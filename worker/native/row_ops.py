"""What a decoder does to each token between its products, through the compiled kernels."""

from __future__ import annotations

from torch import Tensor

from worker.layers.row_ops import RotatesTogether
from worker.native.library import IS_BF16, Kernels


class NativeRowOps(RotatesTogether):
    """RowOps of worker/layers/row_ops.py; TorchRowOps is its twin, which rounds intermediate results too."""

    def __init__(self, kernels: Kernels) -> None:
        self._add_rms_norm = kernels.add_rms_norm
        self._silu_mul = kernels.silu_mul
        self._rotate = kernels.rotate

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)
        self._add_rms_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            eps,
            *x.shape,
            out.data_ptr(),
            IS_BF16[x.dtype],
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._silu_mul(gate_up.data_ptr(), rows, width // 2, out.data_ptr(), IS_BF16[gate_up.dtype])
        return out

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        rows, _, dim = heads.shape
        self._rotate(
            heads.data_ptr(),
            heads.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            count,
            dim,
            IS_BF16[heads.dtype],
        )
        return heads[:, :count]
