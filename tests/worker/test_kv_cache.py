"""How many blocks a worker gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EXIT_INIT, StartupError
from engine.plan import StepKind
from tests.worker.conftest import MODEL, SCHEDULE, Harness
from worker.cache_size import activation_bytes, count_blocks
from worker.config_values import ConfigValues
from worker.kv_cache import KvCache, KvSpec
from worker.models.llama import LlamaForCausalLM

Checkpoint = Callable[..., tuple[Path, Any]]

SPEC = KvSpec(num_layers=3, block_size=8, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16)
PER_SEQUENCE = SCHEDULE.max_seq_len // SPEC.block_size


def count(automatic_bytes: int = 0, available_bytes: int = 2**40, **model: Any) -> int:
    return count_blocks(
        SPEC,
        replace(MODEL, **model),
        SCHEDULE,
        automatic_bytes=automatic_bytes,
        available_bytes=available_bytes,
    )


def test_block_bytes_are_those_of_the_tensors() -> None:
    cache = KvCache(SPEC, 5, torch.device("cpu"))
    size = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    assert size == 5 * SPEC.block_bytes
    assert cache.layers[0][0].shape == (5, 8, 2, 16)


def test_the_more_exact_key_wins() -> None:
    assert count(kv_block_num=50, kv_cache_mib=1, kv_cache_gib=1) == 50
    assert count(kv_cache_mib=1, kv_cache_gib=1) == 2**20 // SPEC.block_bytes
    assert count(kv_cache_gib=1) == 2**30 // SPEC.block_bytes


def test_automatic_takes_what_is_needed_but_not_more_than_its_share() -> None:
    assert count(automatic_bytes=2**40) == SCHEDULE.max_batch_size * PER_SEQUENCE
    assert count(automatic_bytes=(PER_SEQUENCE + 1) * SPEC.block_bytes) == PER_SEQUENCE + 1


@pytest.mark.parametrize(
    ("model", "key"),
    [({"kv_block_num": PER_SEQUENCE - 1}, "kvCacheBlockNum"), ({"kv_cache_gib": -1}, "npuMemSize")],
)
def test_less_than_one_sequence_is_refused_with_numbers_and_keys(model: dict[str, int], key: str) -> None:
    with pytest.raises(StartupError) as caught:
        count(automatic_bytes=(PER_SEQUENCE - 1) * SPEC.block_bytes, **model)
    assert caught.value.exit_code == EXIT_INIT
    for part in (f"{PER_SEQUENCE} blocks", f"{PER_SEQUENCE - 1} are available", "maxSeqLen", key):
        assert part in str(caught.value)


def test_exactly_one_sequence_is_enough() -> None:
    assert count(kv_block_num=PER_SEQUENCE) == PER_SEQUENCE


def test_automatic_never_takes_what_is_not_there() -> None:
    room = (PER_SEQUENCE + 2) * SPEC.block_bytes
    assert count(automatic_bytes=2**40, available_bytes=room) == PER_SEQUENCE + 2
    with pytest.raises(StartupError, match="but 0 are available"):
        count(automatic_bytes=2**40, available_bytes=-1)


def test_no_step_may_need_more_than_the_estimate(checkpoint: Checkpoint) -> None:
    """Peak of the tensors alive during the largest prefill, measured, against what is set aside."""
    folder, _ = checkpoint("llama")
    schedule = replace(SCHEDULE, max_prefill_tokens=512)
    harness = Harness(folder, schedule=schedule)
    sequences = [harness.sequence([5] * 125) for _ in range(4)]
    with torch.profiler.profile(profile_memory=True) as profiler:
        harness.forward(StepKind.PREFILL, sequences)
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    config = LlamaForCausalLM.parse_config(ConfigValues.read(folder / "config.json"))
    assert 0 < peak < activation_bytes(config, schedule)


def test_more_than_the_memory_is_refused() -> None:
    with pytest.raises(StartupError, match="npuMemSize"):
        count(kv_cache_gib=8, available_bytes=2**30)
