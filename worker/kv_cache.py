"""The paged key/value cache: its tensors. How many blocks it gets is in cache_size.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.cache_size import bytes_per_block, head_bytes
from worker.kv_pages import Int8Pages, KvPages, tensors_of


@dataclass(frozen=True, slots=True)
class KvSpec:
    """What one block is made of."""

    num_layers: int
    block_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of the model
    int8: bool = False  # whether the cache holds int8 instead
    shared: bool = False  # whether values are a part of what is kept as keys

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        head = head_bytes(self.head_dim, self.dtype.itemsize, int8=self.int8)
        return bytes_per_block(self.num_layers, self.block_size, self.num_kv_heads, head, shared=self.shared)


class KvCache:
    """Per layer the pages of keys and those of values, which may be the same.

    Zeroed, so that its pages are taken now and not in the middle of a request.
    """

    def __init__(self, spec: KvSpec, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)

        def pages() -> KvPages:
            if not spec.int8:
                return torch.zeros(shape, dtype=spec.dtype, device=device)
            values = torch.zeros(shape, dtype=torch.int8, device=device)
            return Int8Pages(values, torch.zeros(shape[:-1], device=device))

        self.layers: list[tuple[KvPages, KvPages]] = []
        for _ in range(spec.num_layers):
            keys = pages()
            self.layers.append((keys, keys if spec.shared else pages()))

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it; blocks are dimension 0."""
        for keys, values in self.layers:
            yield from tensors_of(keys)
            if values is not keys:
                yield from tensors_of(values)

    def fetch(self, other: KvCache, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of another cache, (its block, ours) each."""
        sources, destinations = (list(blocks) for blocks in zip(*moves, strict=True))
        for tensor, source in zip(self.tensors(), other.tensors(), strict=True):
            tensor[destinations] = source[sources].to(tensor.device)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each; all sources are read before anything is written."""
        sources, destinations = (list(blocks) for blocks in zip(*copies, strict=True))
        for tensor in self.tensors():
            tensor[destinations] = tensor[sources]
