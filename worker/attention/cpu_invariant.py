"""Paged attention on the CPU whose result for a query depends on that query and its keys alone, to the bit.

torch's fused kernel chooses its order of summation by the shapes it sees. So every query meets the same ones:

- queries come in tiles: for each key head the same number of rows, filled up with zeros;
- keys come in the kernel's own portions, of which the last is filled up to one of a few widths (hidden keys
  add exact zeros);
- there are always two products or more, for a single one would be spread over the threads in itself.

The number of rows is a multiple of 8, so that the scratch memory of each thread begins at a cache line:
products in float32 follow the alignment of their operands. Larger tiles and widths below the kernel's own are
used where a probe at the start finds the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.plan import Int32Array
from worker.attention.base import AttentionSpec
from worker.attention.cpu_paged import similar_runs
from worker.batch import Batch
from worker.config_values import MAX_INT
from worker.kv_pages import KvPages, gather, slots_of, store

_KERNEL_KEYS = 512  # keys the kernel takes at a time
_WIDTHS = range(64, _KERNEL_KEYS, 64)
_ROW_MULTIPLE = 8
_MANY_ROWS = 32  # of a tile: the kernel takes at most so many at a time from short queries
_MASK_ELEMENTS = 2**22  # of one call
_PROBED_QUARTERS = (1, 3, 4)  # of a width


@dataclass(frozen=True, slots=True)
class _Tile:
    """`queries` side by side, each with all heads that share a key head, in `rows` rows."""

    queries: int
    rows: int

    @staticmethod
    def of(queries: int, share: int) -> _Tile:
        return _Tile(queries, -(-queries * share // _ROW_MULTIPLE) * _ROW_MULTIPLE)


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of the step that are gathered together: n rows of W keys each."""

    tokens: slice  # of the step's query tokens
    seen: Int32Array  # [tokens] keys that each query sees, rising within a row
    slots: Tensor  # int32 [n * W] of the cache; beyond a row's context its first one again
    k_slots: Tensor  # [n * W, KV, D] destination of the gather
    v_slots: Tensor
    k: Tensor  # [n, KV, W, D] the same memory
    v: Tensor
    mask: Tensor | None  # [n, 1, 1, W], added to the scores; None: too large to keep, made piece by piece


class CpuInvariantAttention:
    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._window = MAX_INT  # while the machine is tried out: the order of sums is what matters
        self._share = spec.num_heads // spec.num_kv_heads
        self._single = _Tile.of(1, self._share)
        self._k_buffer = torch.empty(0, dtype=spec.dtype)
        self._v_buffer = torch.empty(0, dtype=spec.dtype)
        finer = [width for width in _WIDTHS if self._keeps_the_bits(self._single, width)]
        self._widths = np.array([*finer, _KERNEL_KEYS], np.int32)
        many = _Tile.of(max(1, _MANY_ROWS // self._share), self._share)
        agrees = all(self._keeps_the_bits(many, width) for width in self._widths)
        self._many = many if agrees else self._single
        self._window = spec.window or MAX_INT

    def begin_step(self, batch: Batch, block_size: int) -> None:
        self._slots = batch.slots
        widths = self._filled(batch.context_len)
        single = widths[: batch.num_single] // _WIDTHS.step
        bounds = similar_runs(single.tolist()) if len(single) else []
        bounds += [(row, row + 1) for row in range(batch.num_single, len(widths))]
        # the first row of a run is its longest
        shapes = [(slice(first, last), int(widths[first])) for first, last in bounds]
        self._reserve(max((rows.stop - rows.start) * width for rows, width in shapes))
        self._runs = [self._run(batch, rows, width, block_size) for rows, width in shapes]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        store(k_cache, k, self._slots)
        store(v_cache, v, self._slots)
        k_slots, v_slots = slots_of(k_cache), slots_of(v_cache)
        parts: list[Tensor] = []
        for run in self._runs:
            gather(k_slots, run.slots, run.k_slots)
            gather(v_slots, run.slots, run.v_slots)
            if run.mask is not None:
                parts.append(self._attend(self._single, q[run.tokens], run.k, run.v, run.mask))
            else:
                parts += self._prefill(q[run.tokens], run.k, run.v, run.seen)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # -- arithmetic -----------------------------------------------------------------------------------

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, seen: Int32Array) -> Iterator[Tensor]:
        """q: [Q, H, D] of one row, k, v: [1, KV, W, D] -> pieces of [Q, H * D].

        Piece by piece, so that the first queries do not multiply with all the keys that the last ones see.
        """
        tile = self._many
        widths = self._filled(seen)
        first = 0
        while first < len(q):
            width = int(widths[first])
            tiles = -(-int((widths[first:] == width).sum()) // tile.queries)
            tiles = max(1, min(tiles, _MASK_ELEMENTS // (tile.rows * width)))
            last = min(first + tiles * tile.queries, len(q))
            width = int(widths[last - 1])
            hidden = self._mask(np.resize(seen[first:last], tiles * tile.queries), width)
            mask = hidden.repeat_interleave(self._share, dim=0).view(tiles, 1, -1, width)
            mask = functional.pad(mask, (0, 0, 0, tile.rows - mask.shape[2]))
            keys, values = _repeated(tiles, k[:, :, :width], v[:, :, :width])
            yield self._attend(tile, q[first:last], keys, values, mask)
            first = last

    def _attend(self, tile: _Tile, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """n tiles. q: [Q, H, D]; k, v: [n, KV, W, D]; mask: [n, 1, 1 or rows, W] -> [Q, H * D]."""
        spec, tiles = self._spec, len(k)
        missing = tiles * tile.queries - len(q)
        queries = functional.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q
        split = (tiles, tile.queries, spec.num_kv_heads, self._share, spec.head_dim)
        own = queries.reshape(split).transpose(1, 2).flatten(2, 3)  # [n, KV, queries * share, D]
        rows = functional.pad(own, (0, 0, 0, tile.rows - own.shape[2]))
        if tiles * spec.num_kv_heads == 1:
            rows, k, v, mask = _repeated(2, rows, k, v, mask)
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        by_query = out[:tiles, :, : own.shape[2]].reshape(tiles, spec.num_kv_heads, tile.queries, -1)
        return by_query.transpose(1, 2).reshape(tiles * tile.queries, -1)[: len(q)]

    def _mask(self, seen: Int32Array, width: int) -> Tensor:
        """[len(seen), width], to be added to the scores."""
        places = np.arange(width, dtype=np.int32)[None]
        outside = (places >= seen[:, None]) | (places < seen[:, None] - self._window)
        hidden = torch.from_numpy(outside)
        return torch.zeros(hidden.shape, dtype=self._spec.dtype).masked_fill_(hidden, float("-inf"))

    def _filled(self, num_keys: Int32Array) -> Int32Array:
        """What these numbers of keys, all at least 1, are filled up to."""
        whole = (num_keys - 1) // _KERNEL_KEYS * _KERNEL_KEYS
        filled: Int32Array = whole + self._widths[np.searchsorted(self._widths, num_keys - whole)]
        return filled

    def _keeps_the_bits(self, tile: _Tile, width: int) -> bool:
        """Whether such tiles, filled up to `width` in the kernel's last step, give what single queries give
        that are filled up to the whole step.
        """
        num_queries = max(4, tile.queries)
        tiles = -(-num_queries // tile.queries)
        for before, quarters in product((0, _KERNEL_KEYS), _PROBED_QUARTERS):
            whole = before + _KERNEL_KEYS
            context = before + width * quarters // 4
            q, k, v = self._revealing(num_queries, context, whole)
            mask = self._mask(np.array([context], np.int32), whole)[:, None, None]
            want = self._repeatedly(self._single, num_queries, q, k, v, mask)
            k, v, mask = k[:, :, : before + width], v[:, :, : before + width], mask[..., : before + width]
            if not torch.equal(self._repeatedly(tile, tiles, q, k, v, mask), want):
                return False
        return True

    def _repeatedly(self, tile: _Tile, count: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """`_attend` with the one set of keys and the one mask for each of `count` tiles."""
        keys, values, hidden = _repeated(count, k, v, mask)
        return self._attend(tile, q, keys, values, hidden)

    def _revealing(self, num_queries: int, context: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """q: [Q, H, D] and k, v: [1, KV, width, D], zero beyond `context`, that show an order of summation.

        Each value comes again with the other sign under an equal key: what is left of the sums is rounding.
        """
        spec, generator = self._spec, torch.Generator().manual_seed(0)
        q = torch.randn(num_queries, spec.num_heads, spec.head_dim, generator=generator)
        k, v = torch.randn(2, 1, spec.num_kv_heads, context // 2, spec.head_dim, generator=generator)
        pairs = (torch.cat((k, k), dim=2), torch.cat((v, -v), dim=2))
        keys, values = (functional.pad(x, (0, 0, 0, width - context)).to(spec.dtype) for x in pairs)
        return q.to(spec.dtype), keys, values

    # -- keys and values ------------------------------------------------------------------------------

    def _run(self, batch: Batch, rows: slice, width: int, block_size: int) -> _Run:
        contexts = batch.context_len[rows]
        tokens = slice(int(batch.query_start[rows.start]), int(batch.query_start[rows.stop]))
        if rows.start < batch.num_single:
            seen, mask = contexts, self._mask(contexts, width)[:, None, None]
        else:
            (last,) = contexts
            seen, mask = np.arange(last - (tokens.stop - tokens.start), last, dtype=np.int32) + 1, None
        slots = self._slots_of(contexts, batch.block_table[rows], width, block_size)
        head = (self._spec.num_kv_heads, self._spec.head_dim)
        size = len(slots) * math.prod(head)
        k_slots, v_slots = (buffer[:size].view(-1, *head) for buffer in (self._k_buffer, self._v_buffer))
        k, v = (x.view(-1, width, *head).transpose(1, 2) for x in (k_slots, v_slots))
        return _Run(tokens, seen, slots, k_slots, v_slots, k, v, mask)

    @staticmethod
    def _slots_of(contexts: Int32Array, block_table: Int32Array, width: int, block_size: int) -> Tensor:
        """int32 [n * width]: where the keys of each row lie, then its first one again and again.

        A mask hides those, but not the NaN that an earlier owner may have left in the row's last block.
        """
        places = np.arange(width, dtype=np.int32)[None]
        own = np.where(places < contexts[:, None], places, 0)
        blocks = np.take_along_axis(block_table, own // block_size, axis=1)
        return torch.from_numpy((blocks * block_size + own % block_size).reshape(-1))

    def _reserve(self, num_slots: int) -> None:
        """Room for the largest run; they come one after the other and share it."""
        size = num_slots * self._spec.num_kv_heads * self._spec.head_dim
        if size > len(self._k_buffer):
            self._k_buffer = torch.empty(size + size // 4, dtype=self._spec.dtype)
            self._v_buffer = torch.empty(size + size // 4, dtype=self._spec.dtype)


def _repeated(count: int, *tensors: Tensor) -> Iterator[Tensor]:
    """Each [1, ...] as [count, ...], without a copy."""
    return (x.expand(count, -1, -1, -1) for x in tensors)
