"""The paged key/value cache: its tensors, and how many blocks it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.settings import ModelSettings, ScheduleSettings
from worker.hf_config import DecoderConfig


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
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size


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


def count_blocks(
    spec: KvSpec,
    model: ModelSettings,
    schedule: ScheduleSettings,
    *,
    automatic_bytes: int,
    available_bytes: int,
) -> int:
    """Blocks of one worker: kvCacheBlockNum, else kvCacheMemMiB, else npuMemSize, else automatic.

    `available_bytes`: what this worker's cache may take, with the other workers and the step's own tensors
    already thought of. `automatic_bytes`: what it should take when nobody said how much.
    Raises StartupError when the blocks do not fit, or cannot hold one sequence of maxSeqLen.
    """
    per_sequence = -(-schedule.max_seq_len // spec.block_size)
    if model.kv_block_num > 0:
        key, blocks = "kvCacheBlockNum", model.kv_block_num
    elif model.kv_cache_mib > 0:
        key, blocks = "kvCacheMemMiB", model.kv_cache_mib * 2**20 // spec.block_bytes
    elif model.kv_cache_gib > 0:
        key, blocks = "npuMemSize", model.kv_cache_gib * 2**30 // spec.block_bytes
    else:
        key = "npuMemSize"
        affordable = max(0, min(automatic_bytes, available_bytes)) // spec.block_bytes
        blocks = min(affordable, schedule.max_batch_size * per_sequence)
    if blocks < per_sequence:
        raise StartupError(
            f"KV cache: one sequence of maxSeqLen {schedule.max_seq_len} needs {per_sequence} blocks"
            f" of {spec.block_size} tokens ({_mib(per_sequence * spec.block_bytes)}),"
            f" but {blocks} are available; lower maxSeqLen or raise {key}",
            EXIT_INIT,
        )
    if blocks * spec.block_bytes > available_bytes:
        raise StartupError(
            f"KV cache: {blocks} blocks take {_mib(blocks * spec.block_bytes)} in each worker, but its share"
            f" of the memory leaves {_mib(max(0, available_bytes))} beside weights and the tensors of a"
            f" prefill; lower {key} or maxPrefillTokens",
            EXIT_INIT,
        )
    return blocks


def activation_bytes(config: DecoderConfig, schedule: ScheduleSettings) -> int:
    """Bytes the largest step holds besides weights and cache, estimated from what a decoder layer makes.

    Counted in float32 whatever the dtype: long prefills may be widened, and sampling copies logits.
    """
    prompts = min(schedule.max_prefill_tokens, schedule.max_prefill_batch_size * schedule.max_seq_len)
    tokens = max(prompts, schedule.max_seq_len)  # a sequence recomputed alone may exceed the budget
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    # residual, norm, result; beside them queries, keys, values and what rotates them, or gate, up and product
    per_token = 3 * config.hidden_size + max(4 * heads, 3 * config.intermediate_size)
    logits = 2 * max(schedule.max_batch_size, schedule.max_prefill_batch_size) * config.vocab_size
    return 4 * (tokens * per_token + logits)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
