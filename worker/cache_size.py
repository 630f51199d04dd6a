"""How many blocks a worker's key/value cache gets, and why. Numbers only, so that it works without torch."""

from __future__ import annotations

from typing import Protocol

from engine.errors import EXIT_INIT, StartupError
from engine.quantisation import Quantisation
from engine.settings import ModelSettings, ScheduleSettings
from worker.hf_config import DecoderConfig

CPU_KV_SHARE = 0.25  # of the available memory, over all workers, when npuMemSize is -1


class BlockSpec(Protocol):
    @property
    def block_size(self) -> int:
        """Tokens of one block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""


def holds_int8(model: ModelSettings, quantisation: Quantisation) -> bool:
    """Whether keys and values are kept in int8: the configuration asks for it, or the checkpoint ("C8")."""
    return model.kv_cache_dtype == "int8" or quantisation.int8_kv


def head_bytes(head_dim: int, element_bytes: int, *, int8: bool) -> int:
    """Of the key, or the value, that one head keeps for a token; in int8 with a float32 scale."""
    return head_dim + 4 if int8 else head_dim * element_bytes


def bytes_per_block(
    num_layers: int, block_size: int, num_kv_heads: int, head_size: int, *, shared: bool = False
) -> int:
    """`head_size`: of `head_bytes`. `shared`: values are a part of what is kept as keys."""
    return (1 if shared else 2) * num_layers * num_kv_heads * head_size * block_size


def blocks_per_sequence(max_seq_len: int, block_size: int) -> int:
    return -(-max_seq_len // block_size)


def count_blocks(
    spec: BlockSpec,
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
    per_sequence = blocks_per_sequence(schedule.max_seq_len, spec.block_size)
    key = sizing_key(model)
    if model.kv_block_num > 0:
        blocks = model.kv_block_num
    elif model.kv_cache_mib > 0:
        blocks = model.kv_cache_mib * 2**20 // spec.block_bytes
    elif model.kv_cache_gib > 0:
        blocks = model.kv_cache_gib * 2**30 // spec.block_bytes
    else:
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


def count_host_blocks(
    block_bytes: int, model: ModelSettings, schedule: ScheduleSettings, block_size: int
) -> int:
    """Blocks that swapped requests may keep in the host's memory: cpuMemSize, or all they can ever need."""
    if not schedule.max_preempt_count:
        return 0
    most = schedule.max_batch_size * blocks_per_sequence(schedule.max_seq_len, block_size)
    return min(model.cpu_mem_gib * 2**30 // block_bytes, most)


def sizing_key(model: ModelSettings) -> str:
    """The key of config.json that decides how large the cache is."""
    if model.kv_block_num > 0:
        return "kvCacheBlockNum"
    return "kvCacheMemMiB" if model.kv_cache_mib > 0 else "npuMemSize"


def activation_bytes(config: DecoderConfig, schedule: ScheduleSettings) -> int:
    """Bytes the largest step holds besides weights and cache, estimated from what a decoder layer makes.

    Counted in float32 whatever the dtype: long prefills may be widened, and sampling copies logits.
    """
    prompts = min(schedule.max_prefill_tokens, schedule.max_prefill_batch_size * schedule.max_seq_len)
    tokens = max(prompts, schedule.max_seq_len)  # a sequence recomputed alone may exceed the budget
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    # residual, norm, result; beside them queries, keys, values and what rotates them, or gate, up and product
    per_token = 3 * config.hidden_size + max(4 * heads, 3 * config.intermediate_size)
    if config.experts is not None:  # what goes to them, what comes back, and that in the tokens' order
        per_token += config.experts.per_token * 4 * config.hidden_size
    logits = 2 * max(schedule.max_batch_size, schedule.max_prefill_batch_size) * config.vocab_size
    return 4 * (tokens * per_token + logits)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
