"""The CPU backends against the reference, on random ragged batches with shuffled blocks."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionBackend, AttentionSpec
from worker.attention.cpu_native import CpuNativeAttention, kernels_for
from worker.attention.cpu_paged import similar_runs
from worker.attention.registry import make_attention
from worker.batch import make_batch
from worker.kv_pages import Int8Pages, KvPages, tensors_of
from worker.layers.quantized import quantise_rows
from worker.native.library import all_kernels

# same arithmetic, other order of summation; bfloat16 rounds inputs of order 1 to 2**-8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

backend_of = functools.cache(make_attention)  # one of them finds out about the machine first

new_tokens = st.one_of(st.just(1), st.integers(1, 40))  # a step may have rows of both kinds
rows = st.lists(st.tuples(st.integers(0, 70), new_tokens), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(
    contexts=rows,
    decode=st.booleans(),
    block_size=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    head_dim=st.sampled_from([8, 16, 48, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    int8=st.booleans(),
    window=st.sampled_from([None, 1, 7, 40]),
    seed=st.integers(0, 2**31),
)
def test_paged_attention_equals_the_reference(
    contexts: list[tuple[int, int]],
    decode: bool,
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    int8: bool,
    window: int | None,
    seed: int,
) -> None:
    """Each row: (tokens already cached, new tokens); decode rows have one new token."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    sequences = []
    for cached, new in contexts:
        sequence = Sequence(
            0, np.zeros(cached + (1 if decode else new), np.int32), SamplingParams(max_tokens=1)
        )
        sequence.num_computed = cached
        sequences.append(sequence)
    needed = [-(-sequence.num_tokens // block_size) for sequence in sequences]
    blocks = rng.permutation(sum(needed) + 3).tolist()
    for sequence, count in zip(sequences, needed, strict=True):
        sequence.block_table = [blocks.pop() for _ in range(count)]
    plan = build_plan(StepKind.DECODE if decode else StepKind.PREFILL, sequences, block_size)

    spec = AttentionSpec(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, dtype=dtype, window=window
    )
    q, k, v = (torch.randn(plan.num_tokens, n, head_dim).to(dtype) for n in (heads[0], heads[1], heads[1]))
    cache = torch.randn(2, sum(needed) + 3, block_size, heads[1], head_dim).to(dtype)
    own = np.concatenate([
        np.repeat(sequence.block_table, block_size)[: sequence.num_tokens] * block_size
        + np.arange(sequence.num_tokens) % block_size
        for sequence in sequences
    ])  # fmt: skip
    stale = torch.ones(cache.shape[1] * block_size, dtype=torch.bool)
    stale[torch.from_numpy(own)] = False
    # what an earlier owner left behind: a NaN or an infinity survives any mask and any weight of zero
    left_behind = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    cache.view(2, -1, heads[1], head_dim)[:, stale] = left_behind[
        torch.randint(3, (int(stale.sum()), heads[1], head_dim))
    ]

    def attend(backend: AttentionBackend) -> tuple[torch.Tensor, ...]:
        k_cache, v_cache = (as_pages(pages, int8) for pages in cache.clone().unbind(0))
        backend.begin_step(make_batch(plan, torch.device("cpu")), block_size)
        # the step's tensors are in the batch's order; which row is where does not matter here
        out = backend.forward(q, k, v, k_cache, v_cache)
        return out, *tensors_of(k_cache), *tensors_of(v_cache)

    want, *want_cache = attend(backend_of("reference", spec))
    backends = [backend_of("cpu_paged", spec), backend_of("cpu_invariant", spec)]
    if kernels_for(spec) and not int8:
        backends += [CpuNativeAttention(spec, kernels) for kernels in all_kernels()]
    for backend in backends:
        got, *got_cache = attend(backend)
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert all(
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got_cache, want_cache, strict=True)
        )


@pytest.mark.parametrize("window", [30, 100, 600])
@pytest.mark.parametrize("queries", [1, 9, 150])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.bfloat16, 32)])
def test_a_window_far_from_the_beginning_of_a_text(
    window: int, queries: int, dtype: torch.dtype, dim: int
) -> None:
    """Whole segments and portions of keys lie before it, for some queries of a step or for all of them."""
    torch.manual_seed(window + queries)
    torch.set_num_threads(2)  # segments of one row go to several; the fixture sets it back
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=dim, dtype=dtype, window=window)
    sequence = Sequence(0, np.zeros(1300, np.int32), SamplingParams(max_tokens=1))
    sequence.num_computed = 1300 - queries
    sequence.block_table = np.random.default_rng(queries).permutation(90)[:82].tolist()
    batch = make_batch(build_plan(StepKind.PREFILL, [sequence], 16), torch.device("cpu"))
    q, k, v = (torch.randn(queries, heads, dim).to(dtype) for heads in (4, 2, 2))
    cache = torch.randn(2, 90, 16, 2, dim).to(dtype)

    def attend(backend: AttentionBackend) -> torch.Tensor:
        k_cache, v_cache = cache.clone().unbind(0)
        backend.begin_step(batch, 16)
        return backend.forward(q, k, v, k_cache, v_cache)

    want = attend(make_attention("reference", spec))
    others = [make_attention(name, spec) for name in ("cpu_paged", "cpu_invariant")]
    for backend in [*others, *(CpuNativeAttention(spec, kernels) for kernels in all_kernels())]:
        torch.testing.assert_close(attend(backend), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def as_pages(cache: torch.Tensor, int8: bool) -> KvPages:
    """As it is, or in int8; what is no number then has a scale that is none."""
    return Int8Pages(*quantise_rows(cache)) if int8 else cache


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50))
def test_runs_cover_all_rows_in_order_and_bound_the_padding(widths: list[int]) -> None:
    widths = sorted(widths, reverse=True)
    runs = similar_runs(widths)
    assert [row for first, last in runs for row in range(first, last)] == list(range(len(widths)))
    for first, last in runs:
        assert widths[first] <= 1.5 * widths[last - 1] + 1


def test_rows_of_equal_width_share_one_run() -> None:
    assert similar_runs([3, 3, 3, 2]) == [(0, 4)]


def test_a_step_leaves_slots_of_other_sequences_alone() -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, dtype=torch.float32)
    sequence = Sequence(0, np.zeros(3, np.int32), SamplingParams(max_tokens=1))
    sequence.block_table = [2]
    batch = make_batch(build_plan(StepKind.PREFILL, [sequence], 4), torch.device("cpu"))
    backend = make_attention("cpu_paged", spec)
    k_cache, v_cache = torch.zeros(2, 4, 4, 1, 4).unbind(0)
    backend.begin_step(batch, 4)
    backend.forward(torch.ones(3, 2, 4), torch.ones(3, 1, 4), torch.ones(3, 1, 4), k_cache, v_cache)
    for cache in (k_cache, v_cache):
        assert cache[2, :3].eq(1).all()
        assert cache.sum() == 3 * 4
