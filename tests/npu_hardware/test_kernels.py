"""Each operator against its twin out of torch operators on the CPU. See README.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionSpec
from worker.attention.npu import BLOCK_SIZE, NpuAttention
from worker.attention.reference import ReferenceAttention
from worker.batch import make_batch
from worker.hf_config import RopeConfig
from worker.layers.quantized import (
    W8A16,
    QuantisedWeight,
    W8A8Dynamic,
    W8A8Static,
)
from worker.layers.rotary import RotaryTable
from worker.layers.row_ops import TorchRowOps
from worker.platforms.cpu import CpuPlatform
from worker.platforms.npu import NpuPlatform
from worker.platforms.npu_row_ops import NpuRowOps

NUM_BLOCKS = 24
# results of order 1 in bfloat16, which has 8 bits; the twin computes in float32 and rounds once
CLOSE = {"rtol": 2e-2, "atol": 3e-2}

pytestmark = pytest.mark.timeout(300)


def plan_of(kind: StepKind, rows: list[tuple[int, int]]) -> StepPlan:
    """rows: (tokens cached, tokens new) each, in shuffled blocks."""
    blocks = iter(np.random.default_rng(2).permutation(NUM_BLOCKS).tolist())
    sequences = []
    for cached, new in rows:
        sequence = Sequence(0, np.zeros(cached + new, np.int32), SamplingParams(max_tokens=1))
        sequence.num_computed = cached
        sequence.block_table = [next(blocks) for _ in range(-(-(cached + new) // BLOCK_SIZE))]
        sequences.append(sequence)
    return build_plan(kind, sequences, BLOCK_SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4, 128), (14, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (StepKind.PREFILL, [(0, 300), (0, 7), (0, 128)]),
        (StepKind.PREFILL, [(130, 60), (128, 1), (0, 9), (255, 2)]),
        (StepKind.DECODE, [(700, 1), (3, 1), (127, 1), (128, 1)]),
    ],
    ids=["prefill", "chunk", "decode"],
)
def test_attention_equals_the_reference(
    platform: NpuPlatform,
    kind: StepKind,
    rows: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """What the blocks hold beside the rows' own tokens does not show, and all else is left as it was."""
    torch.manual_seed(3)
    num_heads, num_kv_heads, head_dim = heads
    plan = plan_of(kind, rows)
    spec = AttentionSpec(num_heads, num_kv_heads, head_dim, dtype, window=window)
    q, k, v = (
        torch.randn(plan.num_tokens, n, head_dim).to(dtype) for n in (num_heads, num_kv_heads, num_kv_heads)
    )
    cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim).to(dtype)

    def attend(backend: NpuAttention | ReferenceAttention, device: torch.device) -> tuple[Tensor, Tensor]:
        there = cache.to(device, copy=True)
        backend.begin_step(make_batch(plan, device), BLOCK_SIZE)
        out = backend.forward(q.to(device), k.to(device), v.to(device), there[0], there[1])
        return out.cpu(), there.cpu()

    got, got_cache = attend(NpuAttention(spec), platform.device)
    want, want_cache = attend(ReferenceAttention(spec), torch.device("cpu"))
    torch.testing.assert_close(got.float(), want.float(), **CLOSE)
    assert torch.equal(got_cache, want_cache)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_row_operations_equal_their_twins(platform: NpuPlatform, rows: int, head_dim: int) -> None:
    torch.manual_seed(4)
    ours, twin, device = NpuRowOps(), TorchRowOps(), platform.device
    x, delta = torch.randn(2, rows, 1024).bfloat16()
    weight, gate_up = torch.rand(1024).bfloat16() + 0.5, torch.randn(rows, 512).bfloat16()
    heads = torch.randn(rows, 9, head_dim).bfloat16()
    table = RotaryTable(RopeConfig("default", 10000.0), head_dim, 2000, torch.bfloat16, torch.device("cpu"))
    cos, sin = table.gather(torch.randint(2000, (rows,)))

    def close(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got.cpu().float(), want.float(), **CLOSE)

    for addend in (None, delta):
        mine, its = x.to(device, copy=True), x.clone()
        there = None if addend is None else addend.to(device)
        close(
            ours.add_rms_norm(mine, there, weight.to(device), 1e-6),
            twin.add_rms_norm(its, addend, weight, 1e-6),
        )
        close(mine, its)
    close(ours.silu_mul(gate_up.to(device)), twin.silu_mul(gate_up))
    angles = cos.to(device), sin.to(device)
    close(ours.rotate(heads.to(device), 5, *angles), twin.rotate(heads, 5, cos, sin))
    for got, want in zip(
        ours.rotate_apart(heads.to(device), 5, 2, *angles),
        twin.rotate_apart(heads, 5, 2, cos, sin),
        strict=True,
    ):
        close(got, want)


def quantised(kind: str, outs: int, ins: int) -> QuantisedWeight:
    weight = torch.randint(-127, 128, (outs, ins), dtype=torch.int8)
    scale = (torch.rand(outs) + 0.5) / (127 * ins**0.5)
    bias = torch.randn(outs)
    if kind == "w8a8":
        sums = torch.randint(-1000, 1000, (outs,), dtype=torch.int32)
        return W8A8Static(weight, 0.03, 3.0, sums, 0.03 * scale)
    if kind == "w8a8_dynamic":
        return W8A8Dynamic(weight, scale, bias)
    return W8A16(weight, scale, torch.randint(-5, 6, (outs,)).float(), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["w8a8", "w8a8_dynamic", "w8a16"])
def test_quantised_layers_equal_the_cpus(platform: NpuPlatform, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    given = quantised(kind, outs=320, ins=256)
    x = torch.randn(33, 256).to(dtype)
    got = platform.pack_quantised(given, dtype)(x.to(platform.device)).cpu().float()
    want = CpuPlatform().pack_quantised(given, torch.float32)(x.float())
    # one step of quantisation more or less where a fraction lies half way
    torch.testing.assert_close(got, want, rtol=3e-2, atol=6e-2)
