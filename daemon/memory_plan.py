"""What a model will take of this machine's memory, told before anything is loaded, and without torch.

The arithmetic is the worker's own (worker/cache_size.py); only the speed of devices is unknown here, and the
memory of those that only their own library can see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import EXIT_INIT, StartupError
from engine.quantisation import Quantisation, read_quantisation
from engine.settings import ModelSettings, ScheduleSettings
from engine.weight_files import StoredTensor, WeightFault, read_weights
from worker.cache_size import (
    CPU_KV_SHARE,
    activation_bytes,
    blocks_per_sequence,
    bytes_per_block,
    count_blocks,
    count_host_blocks,
    head_bytes,
    holds_int8,
    sizing_key,
)
from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig
from worker.models.table import GENERIC, family_of
from worker.platforms.memory_limits import MemoryInfo
from worker.shard import Shard, check_divides

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What a checkpoint's files hold together."""

    num_files: int
    elements: Counter[str]  # stored type ("BF16", "F32", ...) -> number of elements
    quantisation: Quantisation
    tensors: Mapping[str, StoredTensor]

    @property
    def main_type(self) -> str:
        """The type most elements have that are not quantised; of strange ones when there are no others."""
        plain: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if tensor.dtype in _NAMES and name not in self.quantisation.extras:
                plain[tensor.dtype] += math.prod(tensor.shape)
        return (plain or self.elements).most_common(1)[0][0]

    def bytes_held(self, dtype: str) -> int:
        """What a worker keeps of them, computing in `dtype`."""
        return self.quantisation.bytes_held(self.tensors, _BYTES[dtype])


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Of one worker; all sizes in bytes."""

    architecture: str
    weights: StoredWeights
    dtype: str  # it computes in
    weight_bytes: int  # in that type
    activation_bytes: int
    block_size: int  # tokens
    block_bytes: int
    int8_cache: bool
    max_seq_len: int  # maxSeqLen, or less where the model ends earlier
    sizing_key: str  # what decides how large the cache is
    num_blocks: int | None  # None: known on the device only
    available: int | None  # this worker's share of the memory; None: known on the device only

    @property
    def blocks_per_sequence(self) -> int:
        return blocks_per_sequence(self.max_seq_len, self.block_size)


def plan_memory(
    model: ModelSettings, schedule: ScheduleSettings, num_workers: int, memory: MemoryInfo
) -> MemoryPlan:
    """The plan of one worker, which holds a rank's part of the model, beside its equals.

    Raises StartupError when the model cannot be served by this build or does not fit, in the worker's words.
    """
    shard = Shard(0, model.world_size, model.moe_ep)
    config, architecture = _read_decoder(model, shard)
    weights = _stored_weights(model.weight_path)
    dtype = _compute_dtype(model, weights)
    limits = _limits(schedule, config)
    int8_cache = holds_int8(model, weights.quantisation)
    plan = MemoryPlan(
        architecture=architecture,
        weights=weights,
        dtype=dtype,
        weight_bytes=weights.bytes_held(dtype) // shard.size,
        activation_bytes=activation_bytes(config, limits),
        block_size=schedule.block_size,
        block_bytes=bytes_per_block(
            config.num_layers,
            schedule.block_size,
            shard.count(config.num_kv_heads),
            head_bytes(config.head_dim, _BYTES[dtype], int8=int8_cache),
            shared=config.shares_pages,
        ),
        int8_cache=int8_cache,
        max_seq_len=limits.max_seq_len,
        sizing_key=sizing_key(model),
        num_blocks=None,
        available=None,
    )
    if model.device_type in ("npu", "cuda"):
        return plan
    share = memory.available // num_workers
    host_blocks = count_host_blocks(plan.block_bytes, model, limits, plan.block_size)
    blocks = count_blocks(
        plan,
        model,
        limits,
        automatic_bytes=int(memory.available * CPU_KV_SHARE) // num_workers,
        available_bytes=share - plan.weight_bytes - plan.activation_bytes - host_blocks * plan.block_bytes,
    )
    return replace(plan, num_blocks=blocks, available=share)


def _read_decoder(model: ModelSettings, shard: Shard) -> tuple[DecoderConfig, str]:
    values = ConfigValues.read(model.weight_path / "config.json")
    architecture, family = family_of(values)
    how = " through transformers" if family is GENERIC else ""
    config = family.parse(values)
    check_divides(config, shard, model.weight_path, has_own_family=family is not GENERIC)
    return config, f"{architecture}{how}"


def _stored_weights(folder: Path) -> StoredWeights:
    """Raises StartupError with all that is wrong with the files."""
    try:
        tensors = read_weights(folder)
        quantisation = read_quantisation(folder, tensors)
    except WeightFault as fault:
        raise StartupError(str(fault), EXIT_INIT) from None
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += math.prod(tensor.shape)
    if not elements:
        raise StartupError(f"{folder} holds no tensors in *.safetensors files", EXIT_INIT)
    files = {tensor.file for tensor in tensors.values()}
    return StoredWeights(len(files), elements, quantisation, tensors)


def _compute_dtype(model: ModelSettings, weights: StoredWeights) -> str:
    if model.dtype != "auto":
        name: str = model.dtype
    elif weights.main_type in _NAMES:
        name = _NAMES[weights.main_type]
    else:
        raise StartupError(
            f"{model.weight_path}: weights stored as {weights.main_type} are not supported", EXIT_INIT
        )
    on_cpu = model.device_type not in ("npu", "cuda")
    return "float32" if on_cpu and name == "float16" else name


def _limits(schedule: ScheduleSettings, config: DecoderConfig) -> ScheduleSettings:
    """The schedule with the length that is in force: the model may end before maxSeqLen."""
    longest = min(schedule.max_seq_len, config.usable_positions)
    return replace(schedule, max_seq_len=longest, max_input_len=min(schedule.max_input_len, longest - 1))
