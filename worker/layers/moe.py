"""Layers of which every token takes a few experts only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.hf_config import ExpertsConfig
from worker.layers.row_ops import RowOps
from worker.platforms.base import Linear

_LEAST_SUM = 1e-20  # of chosen scores; sigmoids may all be 0


class Router:
    """Chooses the experts of each token. A row's choice depends on that row alone."""

    def __init__(self, config: ExpertsConfig, linear: Linear, correction: Tensor | None) -> None:
        """`linear`: hidden -> experts. `correction`: float32 [experts]."""
        self._config = config
        self._linear = linear
        self._correction = correction
        self.num_experts = config.num_experts

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, hidden] -> weights, float32 [T, per_token], and experts, int64 of the same shape."""
        config = self._config
        logits = self._linear(x.float() if config.exact else x).float()
        scores = logits.softmax(dim=-1) if config.scoring == "softmax" else _sigmoid(logits)
        judged = scores if self._correction is None else scores + self._correction
        if config.groups_per_token < config.num_groups:
            judged = self._within_groups(judged)
        experts = judged.topk(config.per_token, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_LEAST_SUM)
        return weights * config.scale, experts

    def _within_groups(self, judged: Tensor) -> Tensor:
        """judged: [T, experts] -> the same with minus infinity for those outside of the best groups."""
        config = self._config
        groups = judged.view(len(judged), config.num_groups, -1)
        of_group = groups.topk(config.scores_of_group, dim=-1).values.sum(dim=-1)
        chosen = of_group.topk(config.groups_per_token, dim=-1).indices
        outside = torch.ones_like(of_group, dtype=torch.bool).scatter_(-1, chosen, False)
        return groups.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)


def _sigmoid(x: Tensor) -> Tensor:
    """As a softmax over two: torch's own sigmoid takes another exponential function for what is left of a row
    behind the last whole vector, and where that is depends on the number of rows.
    """
    return torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(dim=-1)[..., 0]


class RoutedExperts:
    """Gated MLPs. A step's tokens are brought into the order of their experts, each of which runs once."""

    def __init__(
        self, router: Router, experts: Sequence[tuple[Linear, Linear]], ops: RowOps, first: int = 0
    ) -> None:
        """`experts`: gate and up merged, and down; of those the router knows all, or some from `first` on."""
        self._router = router
        self._experts = experts
        self._ops = ops
        self._first = first
        self._some = len(experts) < router.num_experts

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden], what these experts contribute."""
        weights, chosen = self._router(x)
        per_token = chosen.shape[1]
        number = len(self._experts)
        places = chosen.flatten()
        if self._some:  # those of other ranks come behind
            places = places - self._first
            places.masked_fill_((places < 0) | (places >= number), number)
        counts = places.bincount(minlength=number)[:number].tolist()
        order = places.argsort(stable=True)[: sum(counts)]
        sorted_x = x.index_select(0, order // per_token)
        parts = []
        for (gate_up, down), tokens in zip(self._experts, torch.split(sorted_x, counts), strict=True):
            if len(tokens):
                parts.append(down(self._ops.silu_mul(gate_up(tokens))))
        y = x.new_zeros(chosen.numel(), x.shape[1])
        if parts:
            y.index_copy_(0, order, torch.cat(parts))
        y = y.view(len(x), per_token, -1)
        # one expert after the other, in the order of their scores: a token's sum must not depend on others
        total = y[:, 0] * weights[:, :1]
        for rank in range(1, per_token):
            total += y[:, rank] * weights[:, rank : rank + 1]
        return total.to(x.dtype)


class WithShared:
    """Experts of a choice, and one for all tokens."""

    def __init__(self, routed: RoutedExperts, shared: Callable[[Tensor], Tensor]) -> None:
        self._routed = routed
        self._shared = shared

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        return self._routed(x).add_(self._shared(x))
