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
from engine.quantisation import Quantisation
from tests.worker.conftest import MODEL, SCHEDULE, Harness
from worker.cache_size import activation_bytes, count_blocks, count_host_blocks, holds_int8
from worker.config_values import ConfigValues
from worker.kv_cache import KvCache, KvSpec
from worker.kv_pages import gather, slots_of, store
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


@pytest.mark.parametrize("int8", [False, True])
def test_block_bytes_are_those_of_the_tensors(int8: bool) -> None:
    spec = replace(SPEC, int8=int8)
    cache = KvCache(spec, 5, torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in cache.tensors()) == 5 * spec.block_bytes
    assert next(cache.tensors()).shape == (5, 8, 2, 16)


def test_int8_takes_a_byte_and_a_scale_for_each_head() -> None:
    assert replace(SPEC, int8=True).block_bytes == 2 * 3 * 8 * 2 * (16 + 4)
    assert replace(SPEC, int8=True, head_dim=64).block_bytes < 0.54 * replace(SPEC, head_dim=64).block_bytes


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_read_again(int8: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = KvCache(replace(SPEC, dtype=dtype, int8=int8), 5, torch.device("cpu"))
    pages = cache.layers[1][0]
    fresh = torch.randn(6, 2, 16).to(dtype) * torch.tensor([1e-3, 1, 50, 1, 1, 1])[:, None, None].to(dtype)
    fresh[4] = 0
    slots = torch.tensor([39, 0, 7, 8, 20, 3])
    stored = store(pages, fresh, slots)
    got = torch.empty_like(fresh)
    gather(slots_of(pages), slots.int(), got)
    assert torch.equal(got, stored)
    if not int8:
        assert torch.equal(got, fresh)
    # half a step, and the rounding to the model's dtype
    step = fresh.float().abs().amax(-1, keepdim=True) / 127
    assert ((got - fresh).float().abs() <= step * (0.501 if dtype == torch.float32 else 1.01)).all()
    cache.copy_blocks([(4, 1)])
    gather(slots_of(pages), torch.tensor([15], dtype=torch.int32), got[:1])
    assert torch.equal(got[0], stored[0])


def test_a_description_may_ask_for_int8() -> None:
    asked, silent = Quantisation(int8_kv=True), Quantisation()
    assert holds_int8(MODEL, asked) and not holds_int8(MODEL, silent)
    assert holds_int8(replace(MODEL, kv_cache_dtype="int8"), silent)


def test_int8_keeps_the_answers_near_and_equal_however_they_are_cached(checkpoint: Checkpoint) -> None:
    """Keys of a fresh prompt are those that a later step reads."""
    folder, _ = checkpoint("llama-gqa-llama3")
    plain, narrow = Harness(folder), Harness(folder, replace(MODEL, kv_cache_dtype="int8"))
    prompt = list(range(5, 30))
    whole = [harness.forward(StepKind.PREFILL, [harness.sequence(prompt)]) for harness in (plain, narrow)]
    assert 0 < (whole[1] - whole[0]).norm() < 0.05 * whole[0].norm()
    sequence = narrow.sequence(prompt[:-1])
    narrow.forward(StepKind.PREFILL, [sequence])
    sequence.append(prompt[-1])
    torch.testing.assert_close(narrow.forward(StepKind.DECODE, [sequence]), whole[1], rtol=1e-4, atol=1e-4)


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


def test_blocks_move_to_another_cache_and_back() -> None:
    spec = KvSpec(num_layers=2, block_size=4, num_kv_heads=1, head_dim=3, dtype=torch.bfloat16)
    cache, host = (KvCache(spec, num_blocks, torch.device("cpu")) for num_blocks in (5, 3))
    for layer in cache.layers:
        for tensor in layer:
            tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for layer in cache.layers for tensor in layer]
    host.fetch(cache, [(4, 0), (1, 2)])
    cache.fetch(host, [(2, 3), (0, 0)])
    for tensor, old in zip((tensor for layer in cache.layers for tensor in layer), before, strict=True):
        assert torch.equal(tensor, old[[4, 1, 2, 1, 4]])


@pytest.mark.parametrize(("count", "gib", "blocks"), [(0, 1, 0), (1, 1, 2**30 // 4096), (1, 5, 300_000)])
def test_the_host_keeps_what_cpu_mem_size_holds_or_all_that_can_ever_be_swapped(
    count: int, gib: int, blocks: int
) -> None:
    schedule = replace(SCHEDULE, max_preempt_count=count, max_batch_size=300, max_seq_len=16_000)
    assert count_host_blocks(4096, replace(MODEL, cpu_mem_gib=gib), schedule, block_size=16) == blocks
