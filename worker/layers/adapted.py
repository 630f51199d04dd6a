"""Linear layers to which LoRA adapters add something, for the tokens of the requests that name one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.platforms.base import Linear


@dataclass(frozen=True, slots=True)
class TokensOf:
    """The tokens of a step that belong to one adapter."""

    adapter: str
    tokens: Tensor | None  # int64 indices; None: all of the step


class StepAdapters:
    """Shared by all layers of a model. `groups` is None while a step has no adapter."""

    __slots__ = ("groups",)

    def __init__(self) -> None:
        self.groups: Sequence[TokensOf] | None = None


@dataclass(frozen=True, slots=True)
class DeltaPart:
    """What an adapter adds to one of the projections merged into a layer."""

    ranks: slice  # its columns of the inner product
    outputs: slice  # its columns of the layer's output
    b: Linear  # rank -> outputs, the scaling multiplied in


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter adds to one layer: for each part, (x a^T)[its ranks] b^T."""

    a: Linear  # in -> sum of the parts' ranks
    parts: tuple[DeltaPart, ...]

    def add_to(self, y: Tensor, x: Tensor, tokens: Tensor | None) -> None:
        """x: [T, in]; y: [T, out], changed in place where `tokens` says."""
        inner = self.a(x if tokens is None else x.index_select(0, tokens))
        for part in self.parts:
            change = part.b(inner[:, part.ranks].contiguous())
            if tokens is None:
                y[:, part.outputs] += change
            else:
                y[:, part.outputs].index_add_(0, tokens, change)


class AdaptedLinear:
    """A layer of merged projections. Without an adapter in the step it costs one comparison more."""

    def __init__(self, linear: Linear, step: StepAdapters) -> None:
        self._linear = linear
        self._step = step
        self.deltas: dict[str, Delta] = {}  # by adapter; those that leave the layer alone are not in here

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in] -> [T, out]."""
        y = self._linear(x)
        if self._step.groups is not None:
            for group in self._step.groups:
                delta = self.deltas.get(group.adapter)
                if delta is not None:
                    delta.add_to(y, x, group.tokens)
        return y


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection as checkpoints name it: where it lies in the layer it was merged into."""

    layer: AdaptedLinear
    outputs: slice  # its columns of the layer's output
    in_features: int  # of the whole, as adapters are made for it
    out_features: int
    own_inputs: slice  # what of it this rank holds
    own_outputs: slice


def merged_delta(
    changes: Sequence[tuple[Projection, Tensor, Tensor]],
    pack: Callable[[Tensor], Linear],
) -> Delta:
    """The delta of one layer. `changes`: projections of it, each with its a [rank, in] and b [out, rank].

    `pack` makes a layer without a bias of a weight.
    """
    parts = []
    start = 0
    for projection, a, b in changes:
        parts.append(DeltaPart(slice(start, start + len(a)), projection.outputs, pack(b)))
        start += len(a)
    return Delta(pack(torch.cat([a for _, a, _ in changes])), tuple(parts))
