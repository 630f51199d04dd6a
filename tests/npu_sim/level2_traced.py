"""The calls of worker/ traced under FakeTensorMode on npu:0, with torch_npu's schemas and meta kernels.

Run by test_levels.py in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionSpec
from worker.attention.npu import BLOCK_SIZE, NpuAttention
from worker.batch import make_batch
from worker.platforms.npu_row_ops import NpuRowOps

DEVICE = torch.device("npu:0")
HEADS, KV_HEADS, DIM, HIDDEN, BLOCKS = 14, 2, 64, 896, 8
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """Plans are numpy arrays, so what is made of them is real until it meets a fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (StepKind.PREFILL, [(0, 150), (0, 7)]),
        (StepKind.PREFILL, [(130, 150), (6, 7)]),
        (StepKind.DECODE, [(149, 150), (6, 7)]),
    ],
    ids=["prefill", "chunk", "decode"],
)
def test_attention(kind: StepKind, rows: list[tuple[int, int]], window: int | None) -> None:
    sequences = []
    for row, (computed, length) in enumerate(rows):
        sequence = Sequence(0, np.zeros(length, np.int32), SamplingParams(max_tokens=8))
        sequence.num_computed = computed
        sequence.block_table = [2 * row, 2 * row + 1]
        sequences.append(sequence)
    batch = make_batch(build_plan(kind, sequences, BLOCK_SIZE), DEVICE)
    tokens = sum(length - computed for computed, length in rows)
    attention = NpuAttention(AttentionSpec(HEADS, KV_HEADS, DIM, HALF, window=window))
    attention.begin_step(batch, BLOCK_SIZE)
    cache = [empty(BLOCKS, BLOCK_SIZE, KV_HEADS, DIM) for _ in range(2)]
    heads = empty(tokens, HEADS + 2 * KV_HEADS, DIM)
    q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # strided, as a merged projection leaves them
    out = attention.forward(q, k, v, *cache)
    assert (tuple(out.shape), out.dtype, out.device) == ((tokens, HEADS * DIM), HALF, DEVICE)


def test_row_operations() -> None:
    ops, tokens = NpuRowOps(), 5
    x, weight = empty(tokens, HIDDEN), empty(HIDDEN)
    assert ops.add_rms_norm(x, None, weight, 1e-6).shape == (tokens, HIDDEN)
    assert ops.silu_mul(empty(tokens, 2 * HIDDEN)).shape == (tokens, HIDDEN)
    cos, sin = empty(tokens, 1, DIM), empty(tokens, 1, DIM)
    q, k = ops.rotate_apart(empty(tokens, HEADS + 2 * KV_HEADS, DIM), HEADS, KV_HEADS, cos, sin)
    assert q.shape == (tokens, HEADS, DIM) and k.shape == (tokens, KV_HEADS, DIM)
    assert ops.rotate(empty(tokens, HEADS, DIM), HEADS, cos, sin).shape == (tokens, HEADS, DIM)


def test_the_front_end_of_a_trace_refuses_what_is_wrong() -> None:
    """Else the tests above would prove nothing."""
    x, weight = empty(3, 64), empty(64)
    with pytest.raises(RuntimeError, match="eps"):
        torch_npu.npu_rms_norm(x, weight, eps=1e-6)
    with pytest.raises(RuntimeError):
        torch_npu.npu_quant_matmul(
            empty(3, 64, dtype=torch.int8), empty(63, 32, dtype=torch.int8), empty(32, dtype=torch.float32),
            output_dtype=HALF,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="devices"):
        torch.nn.functional.linear(x, torch.empty(32, 64, dtype=HALF))
