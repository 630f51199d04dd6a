"""Paged attention on the CPU, out of torch's fused scaled-dot-product kernel.

Decode: one gather of the whole batch's blocks into buffers that live as long as the backend (fresh buffers
of several MB are page-faulted in on every call, which cost 2-6x), then one fused call per group of rows of
similar length. The query heads that share a key head become rows of one query, so no key is read twice.
Prefill: straight from this step's keys and values where nothing is cached and all of it is seen. A step may
have both kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from worker.attention.base import AttentionSpec
from worker.batch import Batch
from worker.config_values import MAX_INT
from worker.kv_pages import KvPages, gather, store


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Rows of a step whose keys are read from the cache; shapes with n rows and W blocks each."""

    tokens: slice  # of the step's query tokens
    blocks: Tensor  # int32 [n * W]
    k_blocks: Tensor  # [n * W, block_size, KV, D] destination of the gather
    v_blocks: Tensor
    k: Tensor  # [n, KV, longest context, D] the same memory
    v: Tensor
    is_chunk: bool  # one row of several query tokens; else n rows of one
    mask: (
        Tensor | None
    )  # added to the scores: [n, 1, 1, longest context], for a chunk [1, 1, share * Q, context]
    padding: Tensor | None  # int64: gathered slots beyond their row's context but within the longest


@dataclass(frozen=True, slots=True)
class _Fresh:
    """Neighbouring rows of equal length with nothing cached, no longer than the window."""

    tokens: slice
    num_rows: int


class CpuPagedAttention:
    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._window = spec.window or MAX_INT
        self._k_buffer = torch.empty(0, dtype=spec.dtype)
        self._v_buffer = torch.empty(0, dtype=spec.dtype)

    def begin_step(self, batch: Batch, block_size: int) -> None:
        self._slots = batch.slots
        self._groups = [*self._decode_groups(batch, block_size), *self._prefill_groups(batch, block_size)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        k, v = store(k_cache, k, self._slots), store(v_cache, v, self._slots)
        parts = []
        for group in self._groups:
            if isinstance(group, _Fresh):
                parts.append(self._fresh(group, q, k, v))
                continue
            gather(k_cache, group.blocks, group.k_blocks)
            gather(v_cache, group.blocks, group.v_blocks)
            if group.padding is not None:
                # a mask does not help against the NaN of an earlier owner: 0 * NaN is NaN
                group.k_blocks.flatten(0, 1).index_fill_(0, group.padding, 0)
                group.v_blocks.flatten(0, 1).index_fill_(0, group.padding, 0)
            parts.append(self._chunk(group, q) if group.is_chunk else self._decode(group, q))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, group: _Gathered, q: Tensor) -> Tensor:
        spec = self._spec
        queries = q[group.tokens].view(
            -1, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim
        )
        out = functional.scaled_dot_product_attention(queries, group.k, group.v, attn_mask=group.mask)
        return out.reshape(len(out), -1)

    def _chunk(self, group: _Gathered, q: Tensor) -> Tensor:
        queries = q[group.tokens].transpose(0, 1)[None]
        out = functional.scaled_dot_product_attention(
            queries, group.k, group.v, attn_mask=group.mask, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)

    def _fresh(self, group: _Fresh, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (
            x[group.tokens].view(group.num_rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        out = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)

    def _decode_groups(self, batch: Batch, block_size: int) -> list[_Gathered]:
        """Of the rows of one query token."""
        if not batch.num_single:
            return []
        widths = -(-batch.context_len[: batch.num_single] // block_size)
        bounds = similar_runs(widths.tolist())
        self._reserve(max((b - a) * int(widths[a]) for a, b in bounds) * block_size)
        groups = []
        for first, last in bounds:
            lengths = batch.context_len[first:last]
            mask = padding = None
            if lengths[-1] != lengths[0] or lengths[0] > self._window:
                places = np.arange(lengths[0], dtype=np.int32)[None]
                beyond = places >= lengths[:, None]
                mask = self._mask(beyond | (places < lengths[:, None] - self._window))[:, None, None]
                row, column = beyond.nonzero()
                padding = torch.from_numpy(row * (int(widths[first]) * block_size) + column)
            table = batch.block_table[first:last, : widths[first]]
            groups.append(
                self._gathered(slice(first, last), table, int(lengths[0]), block_size, mask, padding=padding)
            )
        return groups

    def _prefill_groups(self, batch: Batch, block_size: int) -> list[_Gathered | _Fresh]:
        """Of the other rows."""
        groups: list[_Gathered | _Fresh] = []
        starts = batch.query_start.tolist()
        contexts = batch.context_len.tolist()
        for row in range(batch.num_single, len(contexts)):
            context = contexts[row]
            tokens = slice(starts[row], starts[row + 1])
            queries = tokens.stop - tokens.start
            if queries == context <= self._window:
                previous = groups[-1] if groups else None
                if isinstance(previous, _Fresh) and contexts[row - 1] == context:
                    groups[-1] = _Fresh(slice(previous.tokens.start, tokens.stop), previous.num_rows + 1)
                else:
                    groups.append(_Fresh(tokens, 1))
                continue
            width = -(-context // block_size)
            self._reserve(width * block_size)
            places, last = np.arange(context)[None], np.arange(context - queries, context)[:, None]
            unseen = (places > last) | (places <= last - self._window)
            mask = self._mask(unseen)[None, None]
            table = batch.block_table[row : row + 1, :width]
            groups.append(self._gathered(tokens, table, context, block_size, mask, is_chunk=True))
        return groups

    def _gathered(
        self,
        tokens: slice,
        table: NDArray[np.int32],
        longest: int,
        block_size: int,
        mask: Tensor | None,
        *,
        is_chunk: bool = False,
        padding: Tensor | None = None,
    ) -> _Gathered:
        spec = self._spec
        rows, width = table.shape
        size = rows * width * block_size * spec.num_kv_heads * spec.head_dim
        shape = (rows * width, block_size, spec.num_kv_heads, spec.head_dim)
        k_blocks, v_blocks = self._k_buffer[:size].view(shape), self._v_buffer[:size].view(shape)
        k, v = (
            blocks.view(rows, -1, spec.num_kv_heads, spec.head_dim)[:, :longest].transpose(1, 2)
            for blocks in (k_blocks, v_blocks)
        )
        blocks = torch.from_numpy(table.flatten())
        return _Gathered(tokens, blocks, k_blocks, v_blocks, k, v, is_chunk, mask, padding)

    def _reserve(self, num_tokens: int) -> None:
        """Room for that many keys; groups run one after the other and share it."""
        size = num_tokens * self._spec.num_kv_heads * self._spec.head_dim
        if size > len(self._k_buffer):
            # a quarter more than asked: contexts grow by one block at a time
            self._k_buffer = torch.empty(size + size // 4, dtype=self._spec.dtype)
            self._v_buffer = torch.empty(size + size // 4, dtype=self._spec.dtype)

    def _mask(self, unseen: NDArray[np.bool_]) -> Tensor:
        mask = torch.zeros(unseen.shape, dtype=self._spec.dtype)
        return mask.masked_fill_(torch.from_numpy(unseen), float("-inf"))


def similar_runs(widths: list[int]) -> list[tuple[int, int]]:
    """Cut falling `widths` into runs [first, last) whose padding is worth less than another kernel call.

    Within a run the widest row is at most half as wide again as the narrowest, plus one block.
    """
    runs = []
    first = 0
    for row, width in enumerate(widths):
        if widths[first] > width + width // 2 + 1:
            runs.append((first, row))
            first = row
    runs.append((first, len(widths)))
    return runs
