"""Attention over one short vector for each token instead of keys and values of all heads (DeepSeek-V2, 2024).

A head's plain keys are that vector times a matrix of the head, and so are its values. The matrix of the keys
may as well be multiplied to the query, and that of the values to what attention gives: then all heads attend
to the vectors themselves, as if they were keys and values of one head, and nothing longer is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.platforms.base import Linear


class Headwise:
    """For each head a linear layer of its own."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, heads, in], dense in its last dimension -> [T, heads, out]."""
        return torch.stack([linear(x[:, head]) for head, linear in enumerate(self._linears)], dim=1)


def pairs_apart(x: Tensor) -> Tensor:
    """x: [..., 2n] of pairs side by side -> first halves of all pairs, then second ones; dense."""
    return x.view(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
