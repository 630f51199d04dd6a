"""The paged key/value cache: its tensors. How many blocks it gets is in cache_size.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.cache_size import bytes_per_block


@dataclass(frozen=True, slots=True)
class KvSpec:
    """What one block is made of."""

    num_layers: int
    block_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return bytes_per_block(
            self.num_layers, self.block_size, self.num_kv_heads, self.head_dim, self.dtype.itemsize
        )


class KvCache:
    """Per layer one tensor of keys and one of values, each [num_blocks, block_size, num_kv_heads, head_dim].

    Zeroed, so that its pages are taken now and not in the middle of a request.
    """

    def __init__(self, spec: KvSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self.layers: list[tuple[Tensor, Tensor]] = [
            (
                torch.zeros(shape, dtype=spec.dtype, device=device),
                torch.zeros(shape, dtype=spec.dtype, device=device),
            )
            for _ in range(spec.num_layers)
        ]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each; all sources are read before anything is written."""
        sources, destinations = (list(blocks) for blocks in zip(*copies, strict=True))
        for layer in self.layers:
            for tensor in layer:
                tensor[destinations] = tensor[sources]
