"""Paged attention with the operators of torch_npu: one writes the cache, one attends."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.attention.base import AttentionSpec
from worker.batch import Batch
from worker.kv_pages import KvPages

BLOCK_SIZE = 128  # the operator reads prompts from blocks of this size alone
_MASK_SIZE = 2048  # of the one mask that serves every length
_CAUSAL, _BAND = 3, 4  # values of sparse_mode; both count from the last query and the last key


def refusal(spec: AttentionSpec) -> str | None:
    """Why the operator cannot serve these shapes, with what it could; None: it can."""
    share = spec.num_heads // spec.num_kv_heads
    width = spec.num_kv_heads * spec.head_dim
    if spec.int8_cache:
        return "an int8 KV cache is not supported on deviceType 'npu'; leave kvCacheDtype out, or 'auto'"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"attention in {spec.dtype} is not supported on deviceType 'npu'; float16 or bfloat16 is"
    if spec.head_dim % 16 or spec.head_dim > 512:
        return f"head_dim {spec.head_dim}: an NPU takes multiples of 16 up to 512"
    if share > 64:
        return f"{spec.num_heads} heads for {spec.num_kv_heads} of keys: an NPU takes at most 64 for each"
    if width > 65535:
        return f"{spec.num_kv_heads} heads of keys of {spec.head_dim}: an NPU takes at most 65535 in all"
    return None


class NpuAttention:
    """Lengths go to the operators as host integers: nobody waits for the device to learn them."""

    def __init__(self, spec: AttentionSpec) -> None:
        """StartupError where `refusal` has a word to say."""
        if (why := refusal(spec)) is not None:
            raise StartupError(why, EXIT_INIT)
        self._spec = spec
        self._mask: Tensor | None = None
        self._options: dict[str, object] = {
            "num_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "scale": spec.head_dim**-0.5,
        }

    def begin_step(self, batch: Batch, block_size: int) -> None:
        table = torch.from_numpy(batch.block_table).to(batch.slots.device, non_blocking=True)
        self.begin(batch, table, block_size)

    def begin(self, batch: Batch, table: Tensor, block_size: int) -> None:
        """As `begin_step`, with the block table on the device: int32 [R, B]."""
        if block_size != BLOCK_SIZE:
            raise StartupError(
                f"cacheBlockSize {block_size}: an NPU attends over blocks of {BLOCK_SIZE}; set it to that",
                EXIT_INIT,
            )
        rows = len(batch.context_len)
        # rows of one query see all their keys, so they need no mask; a window is a matter of the mask
        self._unmasked = batch.num_single == rows and self._spec.window is None
        self._slots = batch.slots
        self._step: dict[str, object] = {
            "block_table": table,
            "block_size": block_size,
            # lengths beside a block table are those of each row, those of queries are running totals
            "actual_seq_lengths_kv": batch.context_len.tolist(),
        }
        if self._unmasked:
            self._step["input_layout"] = "BSH"
            return
        if self._mask is None:
            ones = torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.int8, device=batch.slots.device)
            self._mask = ones.triu_(1)
        self._step |= {
            "input_layout": "TND",
            "actual_seq_lengths": batch.query_start[1:].tolist(),
            "atten_mask": self._mask,
            "sparse_mode": _CAUSAL,
        }
        if self._spec.window is not None:
            # tokens before a query's own, not with it
            self._step |= {"sparse_mode": _BAND, "pre_tokens": self._spec.window - 1, "next_tokens": 0}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        assert isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)  # see refusal
        torch.ops.npu.npu_scatter_pa_kv_cache(
            k.contiguous(), v.contiguous(), k_cache, v_cache, self._slots, cache_mode="Norm"
        )
        # [T, 1, H * D] is a batch of T sequences of one query, [T, H, D] all queries one behind the other
        queries = q.flatten(1)[:, None] if self._unmasked else q.contiguous()
        attended, _ = torch.ops.npu.npu_fused_infer_attention_score(
            queries, k_cache.flatten(2), v_cache.flatten(2), **self._step, **self._options
        )
        result: Tensor = attended.flatten(1)
        return result
