"""Attention as the textbook has it, one sequence at a time in float32: the oracle for every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.attention.base import AttentionSpec
from worker.batch import Batch
from worker.kv_pages import KvPages, store


class ReferenceAttention:
    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    def begin_step(self, batch: Batch, block_size: int) -> None:
        self._batch = batch

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        batch = self._batch
        store(k_cache, k, batch.slots)
        store(v_cache, v, batch.slots)
        rows = []
        for row, context in enumerate(batch.context_len.tolist()):
            queries = q[batch.query_start[row] : batch.query_start[row + 1]]
            blocks = torch.from_numpy(batch.block_table[row]).to(q.device)
            keys, values = (_read(pages, blocks) for pages in (k_cache, v_cache))
            rows.append(self._row(queries, keys, values, context))
        return torch.cat(rows)

    def _row(self, q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
        """q: [Q, H, D]; k, v: [blocks, block_size, KV, D] -> [Q, H * D]."""
        share = self._spec.num_heads // self._spec.num_kv_heads
        keys = k.flatten(0, 1)[:context].float().repeat_interleave(share, dim=1)
        values = v.flatten(0, 1)[:context].float().repeat_interleave(share, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self._spec.head_dim**-0.5
        unseen = torch.ones(len(q), context, dtype=torch.bool, device=q.device).triu(context - len(q) + 1)
        if self._spec.window is not None:
            unseen |= ~torch.ones_like(unseen).triu(context - len(q) + 1 - self._spec.window)
        weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype).flatten(1)


def _read(pages: KvPages, blocks: Tensor) -> Tensor:
    """[blocks, block_size, KV, D]."""
    if isinstance(pages, Tensor):
        return pages[blocks]
    return pages.values[blocks] * pages.scales[blocks].unsqueeze(-1)
