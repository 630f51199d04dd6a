"""Root-mean-square normalisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, hidden]; weight: [hidden]. Statistics are taken in float32 whatever the dtype of x.

    A row's bits do not depend on T while hidden is below 32,768: torch spreads longer rows over threads.
    """
    return functional.rms_norm(x, weight.shape, weight, eps)
