"""Keys or values of one layer as the cache holds them: in the model's dtype, or in int8 with scales.

In int8 each head of each token has its own scale, taken when it is stored. Constants found by a calibration
(kv_cache_scale of msModelSlim) would cut off what it has not seen, and exist for few models; these cost 4
bytes beside head_dim and fit any text. What a key becomes depends on that key alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.layers.quantized import quantise_rows


@dataclass(frozen=True, slots=True)
class Int8Pages:
    values: Tensor  # int8 [num_blocks, block_size, num_kv_heads, head_dim]
    scales: Tensor  # float32 [num_blocks, block_size, num_kv_heads]


KvPages = Tensor | Int8Pages  # a tensor is [num_blocks, block_size, num_kv_heads, head_dim]


def tensors_of(pages: KvPages) -> Iterator[Tensor]:
    """All there is to be copied with a block; blocks are dimension 0."""
    yield from (pages,) if isinstance(pages, Tensor) else (pages.values, pages.scales)


def slots_of(pages: KvPages) -> KvPages:
    """The same memory with one index for block and offset."""
    if isinstance(pages, Tensor):
        return pages.flatten(0, 1)
    return Int8Pages(pages.values.flatten(0, 1), pages.scales.flatten(0, 1))


def store(pages: KvPages, fresh: Tensor, slots: Tensor) -> Tensor:
    """Write fresh, [T, num_kv_heads, head_dim], at slots, int64 [T], distinct; `fresh` as it will be read.

    Who attends to fresh keys must take these: a text must not depend on what of it was cached.
    """
    flat = slots_of(pages)
    if isinstance(flat, Tensor):
        flat.index_copy_(0, slots, fresh)
        return fresh
    values, scales = quantise_rows(fresh)
    flat.values.index_copy_(0, slots, values)
    flat.scales.index_copy_(0, slots, scales)
    return torch.mul(values, scales.unsqueeze(-1), out=torch.empty_like(fresh))


def gather(pages: KvPages, index: Tensor, out: Tensor) -> None:
    """Rows of dimension 0, as floating point, into `out`."""
    if isinstance(pages, Tensor):
        torch.index_select(pages, 0, index, out=out)
        return
    scales = pages.scales.index_select(0, index)
    torch.mul(pages.values.index_select(0, index), scales.unsqueeze(-1), out=out)
