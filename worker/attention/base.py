"""The attention seam: causal attention of this step's queries over the paged cache."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from worker.batch import Batch
from worker.kv_pages import KvPages


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shapes a backend is made for; scores are scaled by head_dim ** -0.5."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    int8_cache: bool = False  # whether what is cached is Int8Pages
    window: int | None = None  # latest keys a query sees, its own among them; None: all


class AttentionBackend(Protocol):
    """Made once, told about each step once, called once per layer.

    The last query token of a row is the last token of its context, so query i of q sees the first
    context_len - q + i + 1 keys, or with a window the last of these. What other slots hold, be it NaN, never
    shows in the result: blocks are handed on as their last owner left them.
    """

    def __init__(self, spec: AttentionSpec) -> None: ...

    def begin_step(self, batch: Batch, block_size: int) -> None:
        """Prepare what all layers of the step share."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        """Store k and v at the step's slots, then attend.

        q: [T, num_heads, head_dim]; k, v: [T, num_kv_heads, head_dim], strided or not
        -> [T, num_heads * head_dim].
        """


class RotatingAttention(AttentionBackend):
    """A backend that rotates queries and keys by their positions itself, on the way into the cache."""

    @abstractmethod
    def rotate_and_forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: KvPages, v_cache: KvPages
    ) -> Tensor:
        """As `forward`, of queries and the keys behind them: [T, num_heads + num_kv_heads or more, head_dim].

        cos and sin: from `RotaryTable.gather`.
        """
