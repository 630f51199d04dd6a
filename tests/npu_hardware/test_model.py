"""Whole models on the device: against the CPU, and graphs against steps without. See README.md."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.worker.conftest import MODEL, SCHEDULE
from worker.attention.npu import BLOCK_SIZE
from worker.platforms.npu import GRAPHS, NpuPlatform
from worker.runner import ModelRunner

TINY = Path(__file__).resolve().parents[2] / "models" / "mindie-tiny"
PROMPTS = ([5, 9, 13, 200, 7] * 30, [11, 12, 13], list(range(20, 148)))
STEPS = 12

pytestmark = pytest.mark.timeout(600)


def generate(device: str, prompts: Seq[list[int]] = PROMPTS) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of each prompt, and the logits of the last step; all rows in every step."""
    schedule = replace(
        SCHEDULE, block_size=BLOCK_SIZE, max_seq_len=256, max_input_len=255, max_batch_size=len(prompts)
    )
    settings = replace(MODEL, weight_path=TINY, device_type=device, dtype="bfloat16", kv_block_num=8)
    runner = ModelRunner(settings, schedule, 0, lambda phase, fraction: None)
    runner.load()
    runner.allocate(8)
    runner.warm_up()
    sequences = []
    for index, prompt in enumerate(prompts):
        sequence = Sequence(0, np.array(prompt, np.int32), SamplingParams(max_tokens=STEPS))
        sequence.block_table = [2 * index, 2 * index + 1]
        sequences.append(sequence)
    logits = torch.empty(0)
    for step in range(STEPS):
        plan = build_plan(StepKind.DECODE if step else StepKind.PREFILL, sequences, BLOCK_SIZE)
        logits = runner.forward(plan).float().cpu()
        for sequence, row in zip(sequences, logits, strict=True):
            sequence.num_computed = sequence.num_tokens
            sequence.append(int(row.argmax()))
    tokens = [
        sequence.tokens[len(prompt) : sequence.num_tokens].tolist()
        for sequence, prompt in zip(sequences, prompts, strict=True)
    ]
    return tokens, logits


def test_greedy_tokens_equal_the_cpus(platform: NpuPlatform) -> None:
    del platform
    got, want = generate("npu")[0], generate("cpu")[0]
    # sums in another order may turn a tie of bfloat16 logits; what follows it is another text
    pairs = [pair for rows in zip(got, want, strict=True) for pair in zip(*rows, strict=True)]
    agreeing = sum(mine == its for mine, its in pairs)
    assert [tokens[0] for tokens in got] == [tokens[0] for tokens in want]
    assert agreeing >= 0.8 * len(pairs)


def test_graphs_give_what_steps_without_give(
    platform: NpuPlatform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    del platform
    with caplog.at_level("INFO", logger="llm.platform"):
        with_graphs = generate("npu")
        assert "decode steps captured for" in caplog.text
        monkeypatch.setenv(GRAPHS, "0")
        without = generate("npu")
    assert with_graphs[0] == without[0]
    torch.testing.assert_close(with_graphs[1], without[1], rtol=1e-2, atol=1e-2)


def test_memory_is_told_runs_out_and_comes_back(platform: NpuPlatform) -> None:
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
