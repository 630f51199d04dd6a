"""What a decoder does to each token between its products, out of torch operators."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from worker.layers.activation import silu_mul
from worker.layers.norm import rms_norm
from worker.layers.rotary import apply_rotary


class RowOps(Protocol):
    """A row's bits depend on that row alone."""

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Adds delta to x in place, then normalises: x, delta: [T, hidden], dense; weight: [hidden].

        x may be in other memory afterwards: only who holds this very tensor sees the sum, no view of it.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up: [T, 2 * intermediate], dense, gate first -> [T, intermediate]."""

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """heads: [T, n, head_dim], dense; cos and sin from `RotaryTable.gather`.

        -> the first `count` heads of each token rotated, perhaps in place.
        """

    def rotate_apart(
        self, heads: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `rotate`, of queries and the keys behind them -> both, [T, their heads, head_dim]."""


class RotatesTogether:
    """Queries and keys lie side by side: one rotation for both."""

    @abstractmethod
    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """See `RowOps`."""

    def rotate_apart(
        self, heads: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        qk = self.rotate(heads, num_heads + num_kv_heads, cos, sin)
        return qk[:, :num_heads], qk[:, num_heads:]


class TorchRowOps(RotatesTogether):
    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            x += delta
        return rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def rotate(self, heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rotary(heads[:, :count], cos, sin)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm as its checkpoint has it; the bias is what a quantiser that flattens outliers adds."""

    weight: Tensor  # [hidden]
    bias: Tensor | None  # [hidden]
    eps: float
    ops: RowOps

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Adds delta to x in place, then normalises: x, delta: [T, hidden], dense."""
        y = self.ops.add_rms_norm(x, delta, self.weight, self.eps)
        return y if self.bias is None else y.add_(self.bias)
