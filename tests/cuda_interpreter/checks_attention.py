"""The attention kernels against the reference, on ragged steps with shuffled blocks full of NaN elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.cuda_interpreter.interpreter  # noqa: F401
from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionSpec
from worker.attention.reference import ReferenceAttention
from worker.attention.triton_paged import TritonAttention
from worker.batch import Batch, make_batch
from worker.hf_config import RopeConfig
from worker.kv_pages import Int8Pages, KvPages, tensors_of
from worker.layers.quantized import quantise_rows
from worker.layers.rotary import RotaryTable, apply_rotary

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

# (tokens already cached, new tokens) of each row
DECODE = [(4, 1), (129, 1), (0, 1)]
PREFILL = [(0, 7), (0, 35), (0, 2)]
MIXED = [(50, 20), (33, 1), (0, 37), (70, 1), (17, 3)]


class Step:
    """A step with what every backend is given for it."""

    def __init__(
        self, rows: list[tuple[int, int]], spec: AttentionSpec, block_size: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(len(rows))
        self.block_size = block_size
        sequences = []
        for cached, new in rows:
            sequence = Sequence(0, np.zeros(cached + new, np.int32), SamplingParams(max_tokens=1))
            sequence.num_computed = cached
            sequences.append(sequence)
        needed = [-(-sequence.num_tokens // block_size) for sequence in sequences]
        blocks = np.random.default_rng(1).permutation(sum(needed) + 2).tolist()
        cache = torch.full((2, len(blocks), block_size, spec.num_kv_heads, spec.head_dim), float("nan"))
        for sequence, count in zip(sequences, needed, strict=True):
            sequence.block_table = [blocks.pop() for _ in range(count)]
            for place in range(sequence.num_computed):
                block = sequence.block_table[place // block_size]
                cache[:, block, place % block_size] = torch.randn(2, *cache.shape[3:])
        self.batch: Batch = make_batch(build_plan(StepKind.PREFILL, sequences, block_size), CPU)
        self.cache = cache.to(dtype)
        # as the models hand them on: views of one product
        tokens, heads = len(self.batch.slots), spec.num_heads + 2 * spec.num_kv_heads
        qkv = torch.randn(tokens, heads, spec.head_dim).to(dtype)
        self.qkv = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)

    def pages(self, int8: bool) -> tuple[KvPages, KvPages]:
        k_cache, v_cache = (
            Int8Pages(*quantise_rows(pages)) if int8 else pages for pages in self.cache.clone().unbind(0)
        )
        return k_cache, v_cache


def check(
    rows: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    splits: int | None = 1,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    int8: bool = False,
) -> None:
    spec = AttentionSpec(*heads, head_dim=head_dim, dtype=dtype, int8_cache=int8, window=window)
    step = Step(rows, spec, block_size, dtype)
    reference, ours = ReferenceAttention(spec), TritonAttention(spec)
    reference.begin_step(step.batch, block_size)
    wanted_pages, pages = step.pages(int8), step.pages(int8)
    wanted = reference.forward(*step.qkv, *wanted_pages)
    table = torch.from_numpy(step.batch.block_table)
    ours.begin(step.batch, table, torch.from_numpy(step.batch.context_len), block_size, splits)
    got = ours.forward(*step.qkv, *pages)
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for mine, theirs in zip(pages, wanted_pages, strict=True):
        for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(("block_size", "splits"), [(16, 1), (128, 4)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (8, 1)])
def test_decoding(heads: tuple[int, int], head_dim: int, block_size: int, splits: int) -> None:
    check(DECODE, heads, head_dim, block_size, splits)


@pytest.mark.parametrize(("heads", "splits"), [((2, 2), 1), ((7, 1), 2), ((8, 2), 1)])
@pytest.mark.parametrize("rows", [PREFILL, MIXED])
def test_prompts_and_pieces_of_them_beside_rows_that_decode(
    rows: list[tuple[int, int]], heads: tuple[int, int], splits: int
) -> None:
    check(rows, heads, splits=splits)


@pytest.mark.parametrize(("window", "splits"), [(1, 1), (7, 4), (40, 1), (40, 4)])
def test_a_window(window: int, splits: int) -> None:
    check(MIXED, window=window, splits=splits)


@pytest.mark.parametrize("head_dim", [8, 40, 256])
def test_sizes_of_heads(head_dim: int) -> None:
    check([(20, 5), (50, 1)], head_dim=head_dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("int8", "splits"), [(False, 1), (True, 2)])
def test_16_bits_and_a_cache_in_int8(dtype: torch.dtype, int8: bool, splits: int) -> None:
    check(MIXED, dtype=dtype, int8=int8, splits=splits)


def test_a_cache_in_int8_of_float32() -> None:
    check(MIXED, int8=True)


@pytest.mark.parametrize(("head_dim", "int8"), [(64, False), (40, False), (64, True)])
def test_rotating_on_the_way_is_rotating_before(head_dim: int, int8: bool) -> None:
    spec = AttentionSpec(4, 2, head_dim, dtype=torch.float32, int8_cache=int8)
    step = Step(MIXED, spec, 16, torch.float32)
    rotary = RotaryTable(RopeConfig("default", 10_000.0), head_dim, 200, torch.float32, CPU)
    cos, sin = rotary.gather(step.batch.positions)
    q, k, v = step.qkv
    ours, reference = TritonAttention(spec), ReferenceAttention(spec)
    ours.begin_step(step.batch, 16)
    reference.begin_step(step.batch, 16)
    wanted_pages, pages = step.pages(int8), step.pages(int8)
    wanted = reference.forward(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, *wanted_pages)
    got = ours.rotate_and_forward(torch.cat((q, k), dim=1), v, cos, sin, *pages)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(pages, wanted_pages, strict=True):
        for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
            # a rounding of the last bit may make the next whole number of a key
            off = (a.nan_to_num().float() - b.nan_to_num().float()).abs()
            assert off.max() <= (1 if b.dtype is torch.int8 else 1e-5)


def test_numbers_of_parts_are_found_by_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.attention import triton_paged

    monkeypatch.setattr(triton_paged, "_units_of", lambda device: 132)
    spec = AttentionSpec(num_heads=16, num_kv_heads=4, head_dim=32, dtype=torch.float32)
    step = Step([(1000, 1), (3, 1)], spec, 16, torch.float32)
    ours, reference = TritonAttention(spec), ReferenceAttention(spec)
    ours.begin_step(step.batch, 16)
    reference.begin_step(step.batch, 16)
    assert [launch.splits for launch in ours._launches] == [2]  # 1008 keys are no more parts of 256
    ours._units = 1
    assert ours._splits(64, 100_000) == 1
    ours._units = 132
    assert ours._splits(2, 100_000) == 32 and ours._splits(16, 100_000) == 4
    wanted = reference.forward(*step.qkv, *step.pages(False))
    torch.testing.assert_close(ours.forward(*step.qkv, *step.pages(False)), wanted, rtol=2e-5, atol=2e-5)


def test_a_step_of_single_rows_is_told_by_tensors_alone() -> None:
    """What a graph is replayed on: other lengths, tables and slots in the tensors of an earlier `begin`."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    first, second = (Step([(n, 1), (m, 1)], spec, 16, torch.float32) for n, m in ((30, 5), (17, 40)))
    batch = first.batch
    width = max(first.batch.block_table.shape[1], second.batch.block_table.shape[1])
    table, lengths = torch.zeros(2, width, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    ours, reference = TritonAttention(spec), ReferenceAttention(spec)
    ours.begin(batch, table, lengths, 16, splits=2)
    batch.slots.copy_(second.batch.slots)
    lengths.copy_(torch.from_numpy(second.batch.context_len))
    table[:, : second.batch.block_table.shape[1]] = torch.from_numpy(second.batch.block_table)
    reference.begin_step(second.batch, 16)
    wanted = reference.forward(*second.qkv, *second.pages(False))
    torch.testing.assert_close(ours.forward(*second.qkv, *second.pages(False)), wanted, rtol=2e-5, atol=2e-5)
