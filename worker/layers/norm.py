"""Root-mean-square normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, hidden]; weight: [hidden]. Statistics are taken in float32 whatever the dtype of x.

    A row's bits do not depend on T while hidden is below 32,768: torch spreads longer rows over threads.
    """
    return functional.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm as its checkpoint has it; the bias is what a quantiser that flattens outliers adds."""

    weight: Tensor  # [hidden]
    bias: Tensor | None  # [hidden]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]."""
        y = rms_norm(x, self.weight, self.eps)
        return y if self.bias is None else y.add_(self.bias)
