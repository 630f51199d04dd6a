"""ModelRunner from the outside: its facts, its progress, its warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.plan import StepKind, build_plan
from engine.settings import ModelSettings
from tests.worker.conftest import BLOCK_SIZE, MAX_SEQ_LEN, MODEL, SCHEDULE, Harness
from worker.runner import ModelRunner

Checkpoint = Callable[..., tuple[Path, Any]]


def test_facts_about_the_model(checkpoint: Checkpoint) -> None:
    folder, model = checkpoint("qwen2-tied")
    runner = Harness(folder).runner
    assert runner.vocab_size == 199
    assert runner.eos_token_ids == (2,)
    assert runner.max_position_embeddings == MAX_SEQ_LEN
    assert runner.dtype == torch.float32
    assert runner.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert runner.size_kv_cache() == SCHEDULE.max_batch_size * MAX_SEQ_LEN // BLOCK_SIZE
    assert runner.block_bytes == 2 * 3 * 2 * 8 * BLOCK_SIZE * 4


def test_progress_rises_to_one_in_every_phase(checkpoint: Checkpoint) -> None:
    seen: list[tuple[str, float]] = []
    settings = replace(MODEL, weight_path=checkpoint("llama")[0])
    runner = ModelRunner(settings, SCHEDULE, 0, lambda phase, fraction: seen.append((phase, fraction)))
    runner.load()
    runner.allocate(runner.size_kv_cache())
    runner.warm_up()
    for phase in ("weights", "warm-up"):
        fractions = [fraction for name, fraction in seen if name == phase]
        assert fractions == sorted(fractions)
        assert len(fractions) > 2
        assert fractions[-1] == 1.0


@pytest.mark.parametrize("num_blocks", [16, 64])
def test_warm_up_fits_any_cache_and_changes_no_result(checkpoint: Checkpoint, num_blocks: int) -> None:
    folder, _ = checkpoint("llama-gqa-llama3")
    cold, warm = Harness(folder), Harness(folder)
    warm.runner.allocate(num_blocks)
    warm.runner.warm_up()
    prompt = cold.sequence(list(range(5, 30)))
    prompt.block_table = [9, 2, 7, 5]
    plan = build_plan(StepKind.PREFILL, [prompt], BLOCK_SIZE)
    assert torch.equal(cold.runner.forward(plan), warm.runner.forward(plan))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_requested_dtype_is_computed_in(checkpoint: Checkpoint, dtype: str) -> None:
    folder, model = checkpoint("llama")
    settings: ModelSettings = replace(MODEL, dtype=dtype)  # type: ignore[arg-type]
    harness = Harness(folder, settings)
    want = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    logits = harness.forward(StepKind.PREFILL, [harness.sequence([3, 4, 5])])
    assert harness.runner.dtype == logits.dtype == want
    with torch.inference_mode():
        exact = model(torch.tensor([[3, 4, 5]])).logits[0, -1]
    # the float32 checkpoint rounded to bfloat16 differs by its 8 bits through three layers
    torch.testing.assert_close(logits[0].float(), exact, rtol=0.1, atol=0.3 if dtype == "bfloat16" else 1e-4)
