"""What tests on a real device compare, whichever kind it is: tests/npu_hardware, tests/cuda_hardware."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.worker.conftest import MODEL, SCHEDULE
from worker.attention.base import AttentionBackend, AttentionSpec
from worker.attention.reference import ReferenceAttention
from worker.batch import make_batch
from worker.hf_config import RopeConfig
from worker.layers.quantized import W8A16, QuantisedWeight, W8A8Dynamic, W8A8Static
from worker.layers.rotary import RotaryTable
from worker.layers.row_ops import RowOps, TorchRowOps
from worker.platforms.base import Platform
from worker.platforms.cpu import CpuPlatform
from worker.runner import ModelRunner

TINY = Path(__file__).resolve().parents[1] / "models" / "mindie-tiny"
PROMPTS = ([5, 9, 13, 200, 7] * 30, [11, 12, 13], list(range(20, 148)))
STEPS = 12
NUM_TOKENS = 3072  # of the cache
# results of order 1 in bfloat16, which has 8 bits; the twin computes in float32 and rounds once
CLOSE = {"rtol": 2e-2, "atol": 3e-2}

# (tokens cached, tokens new) of each row
STEP_KINDS = pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (StepKind.PREFILL, [(0, 300), (0, 7), (0, 128)]),
        (StepKind.PREFILL, [(130, 60), (128, 1), (0, 9), (255, 2)]),
        (StepKind.DECODE, [(700, 1), (3, 1), (127, 1), (128, 1)]),
    ],
    ids=["prefill", "chunk", "decode"],
)
HEADS = pytest.mark.parametrize("heads", [(4, 4, 128), (14, 2, 64), (8, 1, 128)])


def plan_of(kind: StepKind, rows: list[tuple[int, int]], block_size: int) -> StepPlan:
    """rows: (tokens cached, tokens new) each, in shuffled blocks."""
    blocks = iter(np.random.default_rng(2).permutation(NUM_TOKENS // block_size).tolist())
    sequences = []
    for cached, new in rows:
        sequence = Sequence(0, np.zeros(cached + new, np.int32), SamplingParams(max_tokens=1))
        sequence.num_computed = cached
        sequence.block_table = [next(blocks) for _ in range(-(-(cached + new) // block_size))]
        sequences.append(sequence)
    return build_plan(kind, sequences, block_size)


def check_attention(
    make: Callable[[AttentionSpec], AttentionBackend],
    device: torch.device,
    spec: AttentionSpec,
    plan: StepPlan,
    block_size: int,
) -> None:
    """What the blocks hold beside the rows' own tokens does not show, and all else is left as it was."""
    torch.manual_seed(3)
    kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    q, k, v = (
        torch.randn(plan.num_tokens, n, head_dim).to(spec.dtype) for n in (spec.num_heads, kv_heads, kv_heads)
    )
    cache = torch.randn(2, NUM_TOKENS // block_size, block_size, kv_heads, head_dim).to(spec.dtype)

    def attend(backend: AttentionBackend, device: torch.device) -> tuple[Tensor, Tensor]:
        there = cache.to(device, copy=True)
        backend.begin_step(make_batch(plan, device), block_size)
        out = backend.forward(q.to(device), k.to(device), v.to(device), there[0], there[1])
        return out.cpu(), there.cpu()

    got, got_cache = attend(make(spec), device)
    want, want_cache = attend(ReferenceAttention(spec), torch.device("cpu"))
    torch.testing.assert_close(got.float(), want.float(), **CLOSE)
    assert torch.equal(got_cache, want_cache)


def check_row_ops(ours: RowOps, device: torch.device, rows: int, head_dim: int) -> None:
    torch.manual_seed(4)
    twin = TorchRowOps()
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
    # in place is allowed, so each is given heads of its own
    close(ours.rotate(heads.to(device, copy=True), 5, *angles), twin.rotate(heads.clone(), 5, cos, sin))
    for got, want in zip(
        ours.rotate_apart(heads.to(device, copy=True), 5, 2, *angles),
        twin.rotate_apart(heads.clone(), 5, 2, cos, sin),
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


def check_quantised(platform: Platform, kind: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(5)
    given = quantised(kind, outs=320, ins=256)
    x = torch.randn(rows, 256).to(dtype)
    got = platform.pack_quantised(given, dtype)(x.to(platform.device)).cpu().float()
    want = CpuPlatform().pack_quantised(given, torch.float32)(x.float())
    # one step of quantisation more or less where a fraction lies half way
    torch.testing.assert_close(got, want, rtol=3e-2, atol=6e-2)


def generate(
    device: str, block_size: int, prompts: Seq[list[int]] = PROMPTS
) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens of each prompt, and the logits of the last step; all rows in every step."""
    schedule = replace(
        SCHEDULE, block_size=block_size, max_seq_len=256, max_input_len=255, max_batch_size=len(prompts)
    )
    each = 256 // block_size
    blocks = (len(prompts) + 1) * each
    settings = replace(MODEL, weight_path=TINY, device_type=device, dtype="bfloat16", kv_block_num=blocks)
    runner = ModelRunner(settings, schedule, 0, lambda phase, fraction: None)
    runner.load()
    runner.allocate(blocks)
    runner.warm_up()
    sequences = []
    for index, prompt in enumerate(prompts):
        sequence = Sequence(0, np.array(prompt, np.int32), SamplingParams(max_tokens=STEPS))
        sequence.block_table = list(range(index * each, (index + 1) * each))
        sequences.append(sequence)
    logits = torch.empty(0)
    for step in range(STEPS):
        plan = build_plan(StepKind.DECODE if step else StepKind.PREFILL, sequences, block_size)
        logits = runner.forward(plan).float().cpu()
        for sequence, row in zip(sequences, logits, strict=True):
            sequence.num_computed = sequence.num_tokens
            sequence.append(int(row.argmax()))
    tokens = [
        sequence.tokens[len(prompt) : sequence.num_tokens].tolist()
        for sequence, prompt in zip(sequences, prompts, strict=True)
    ]
    return tokens, logits


def check_greedy(got: list[list[int]], want: list[list[int]]) -> None:
    # sums in another order may turn a tie of bfloat16 logits; what follows it is another text
    pairs = [pair for rows in zip(got, want, strict=True) for pair in zip(*rows, strict=True)]
    assert [tokens[0] for tokens in got] == [tokens[0] for tokens in want]
    assert sum(mine == its for mine, its in pairs) >= 0.8 * len(pairs)


def check_graphs(
    device: str,
    block_size: int,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`variable`: what turns graphs off."""
    with caplog.at_level("INFO", logger="llm.platform"):
        with_graphs = generate(device, block_size)
        assert "decode steps captured for" in caplog.text
        monkeypatch.setenv(variable, "0")
        without = generate(device, block_size)
    assert with_graphs[0] == without[0]
    torch.testing.assert_close(with_graphs[1], without[1], rtol=1e-2, atol=1e-2)


def check_memory(platform: Platform) -> None:
    before = platform.memory()
    assert 0 < before.available <= before.total
    taken = torch.empty(before.available // 4, dtype=torch.uint8, device=platform.device)
    assert platform.memory().available <= before.available - len(taken) // 2
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2 * before.total, dtype=torch.uint8, device=platform.device)
    assert platform.is_out_of_memory(caught.value)
    del taken
    platform.give_back_memory()
    assert platform.memory().available >= before.available * 0.95
