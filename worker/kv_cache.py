"""The paged key/value cache: its tensors, and how many blocks it gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.settings import ModelSettings, ScheduleSettings


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

    Zeroed, because padded reads touch slots nobody has written, and a NaN there survives any mask.
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


def count_blocks(
    spec: KvSpec,
    model: ModelSettings,
    schedule: ScheduleSettings,
    *,
    automatic_bytes: int,
    available_bytes: int,
) -> int:
    """Blocks of one worker: kvCacheBlockNum, else kvCacheMemMiB, else npuMemSize, else automatic.

    Raises StartupError when they do not fit in memory, or cannot hold one sequence of maxSeqLen.
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
        blocks = min(automatic_bytes // spec.block_bytes, schedule.max_batch_size * per_sequence)
    if blocks < per_sequence:
        raise StartupError(
            f"KV cache: one sequence of maxSeqLen {schedule.max_seq_len} needs {per_sequence} blocks"
            f" of {spec.block_size} tokens ({_mib(per_sequence * spec.block_bytes)}),"
            f" but {blocks} are available; lower maxSeqLen or raise {key}",
            EXIT_INIT,
        )
    if blocks * spec.block_bytes > available_bytes:
        raise StartupError(
            f"KV cache: {blocks} blocks take {_mib(blocks * spec.block_bytes)},"
            f" but {_mib(available_bytes)} of memory are available; lower {key}",
            EXIT_INIT,
        )
    return blocks


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
