"""ModelRunner from the outside: its facts, its progress, its warm-up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import StartupError
from engine.plan import StepKind, StepPlan, build_plan
from engine.settings import ModelSettings, ScheduleSettings
from tests.worker.conftest import BLOCK_SIZE, MAX_SEQ_LEN, MODEL, SCHEDULE, Harness
from worker.executor import LeaderExecutor
from worker.models.llama import LlamaForCausalLM
from worker.platforms.base import Linear
from worker.platforms.cpu import CpuPlatform
from worker.platforms.memory_limits import MemoryInfo
from worker.prompt_logprobs import PromptLogprobs
from worker.runner import ModelRunner
from worker.sampler import Sampler

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


def test_an_end_beyond_the_vocabulary_is_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """min_tokens masks the ends, and would have no logit to mask."""
    folder = shutil.copytree(checkpoint("llama")[0], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 199, 5000]}')
    harness = Harness(folder)
    sequence = harness.sequence([5, 6])
    sequence.params = replace(sequence.params, min_tokens=3)
    logits = harness.forward(StepKind.PREFILL, [sequence])
    sampler = Sampler(harness.runner.vocab_size, harness.runner.eos_token_ids)
    assert sampler.sample(logits, [sequence])[0] >= 0
    assert harness.runner.eos_token_ids == (2,)


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


@pytest.mark.parametrize("block_size", [1, 2, 128])
@pytest.mark.parametrize("num_blocks", [1, 2, 31, 32])
def test_warm_up_stays_inside_the_smallest_cache(
    checkpoint: Checkpoint, block_size: int, num_blocks: int
) -> None:
    schedule = replace(SCHEDULE, block_size=block_size, max_batch_size=64)
    runner = Harness(checkpoint("llama")[0], schedule=schedule).runner
    runner.allocate(num_blocks)
    runner.warm_up()


@pytest.mark.parametrize("max_seq_len", [1, 2])
def test_warm_up_stays_inside_the_shortest_context(checkpoint: Checkpoint, max_seq_len: int) -> None:
    schedule = replace(SCHEDULE, max_seq_len=max_seq_len)
    Harness(checkpoint("llama")[0], schedule=schedule).runner.warm_up()


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


class Memory:
    """A CPU platform's memory that a test sets, in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, available: int) -> None:
        self.available = available
        monkeypatch.setattr(CpuPlatform, "memory", lambda _: MemoryInfo(self.available, self.available))


def runner_of(
    folder: Path, schedule: ScheduleSettings = SCHEDULE, workers: int = 1, **model: Any
) -> ModelRunner:
    settings = replace(MODEL, weight_path=folder, **model)
    return ModelRunner(settings, schedule, 0, lambda phase, fraction: None, num_workers=workers)


@pytest.mark.parametrize("asked", [MAX_SEQ_LEN + 1, 2**32 - 1])
def test_a_context_beyond_the_model_costs_nothing(checkpoint: Checkpoint, asked: int) -> None:
    """Neither a rotary table nor a cache of that length, and every part agrees on the shorter one."""
    folder, _ = checkpoint("llama-gqa-llama3")
    usual, beyond = (
        runner_of(folder),
        runner_of(folder, replace(SCHEDULE, max_seq_len=asked, max_input_len=asked - 1)),
    )
    for runner in (usual, beyond):
        runner.load()
        assert runner.max_seq_len == MAX_SEQ_LEN
    assert beyond.size_kv_cache() == usual.size_kv_cache()
    beyond.allocate(2 * MAX_SEQ_LEN // BLOCK_SIZE)
    beyond.warm_up()


def test_a_shorter_context_than_the_models_stays(checkpoint: Checkpoint) -> None:
    runner = runner_of(checkpoint("llama")[0], replace(SCHEDULE, max_seq_len=40, max_input_len=39))
    runner.load()
    assert (runner.max_seq_len, runner.max_position_embeddings) == (40, MAX_SEQ_LEN)


def test_a_cache_that_cannot_fit_is_refused_before_weights_are_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = checkpoint("llama")
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda *_: pytest.fail("weights were read"))
    Memory(monkeypatch, 2**30)
    for model, schedule in (({"kv_cache_gib": 2}, SCHEDULE), ({"kv_block_num": 1}, SCHEDULE)):
        with pytest.raises(StartupError, match="KV cache"):
            runner_of(folder, schedule, **model).load()


def test_workers_share_the_memory(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cache fits by itself, all of them do not; and a step needs some memory besides."""
    folder, _ = checkpoint("llama")
    memory = Memory(monkeypatch, 2**30)
    runner_of(folder, kv_cache_mib=400, workers=2).load()
    with pytest.raises(StartupError, match="kvCacheMemMiB"):
        runner_of(folder, kv_cache_mib=400, workers=3).load()
    memory.available = 403 * 2**20
    runner_of(folder, kv_cache_mib=400).load()
    hungry = replace(SCHEDULE, max_prefill_tokens=100_000, max_prefill_batch_size=1000)
    with pytest.raises(StartupError, match="maxPrefillTokens"):
        runner_of(folder, hungry, kv_cache_mib=400).load()


def test_a_piece_of_a_prompt_without_memory_fails_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(checkpoint("llama")[0])
    running, prompt = harness.sequence([5, 6, 7]), harness.sequence(list(range(3, 60)))
    harness.forward(StepKind.PREFILL, [running])
    running.append(9)
    prompt.block_table = list(range(30, 38))
    rows = [running, prompt]
    plan = build_plan(
        StepKind.MIXED, rows, BLOCK_SIZE, samples=[running], sample_rows=np.zeros(1, np.int32), ends=[4, 40]
    )
    executor = LeaderExecutor(harness.runner, Sampler(harness.runner.vocab_size))
    whole = executor.run(plan)
    assert not whole.failed
    forward = harness.runner.forward

    def short_of_memory(plan: StepPlan, prompts: PromptLogprobs | None = None) -> torch.Tensor:
        if plan.num_tokens > 8:
            raise MemoryError
        return forward(plan, prompts)

    monkeypatch.setattr(harness.runner, "forward", short_of_memory)
    alone = executor.run(plan)
    assert list(alone.failed) == [prompt]
    assert alone.tokens.tolist() == whole.tokens.tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_fp8_is_asked_for_all_layers_and_not_for_the_head(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[torch.dtype] = []
    packed: list[tuple[int, bool]] = []
    pack = CpuPlatform.pack_linear

    def noted(self: CpuPlatform, weight: torch.Tensor, bias: torch.Tensor | None, **how: bool) -> Linear:
        packed.append((len(weight), how.get("may_round", False)))
        return pack(self, weight, bias, **how)

    monkeypatch.setattr(CpuPlatform, "use_fp8", lambda self, dtype: asked.append(dtype))
    monkeypatch.setattr(CpuPlatform, "pack_linear", noted)
    runner = Harness(checkpoint(name)[0], replace(MODEL, linear_dtype="fp8")).runner
    assert asked == [runner.dtype]
    assert len(packed) >= 12 and all(rounds == (rows != runner.vocab_size) for rows, rounds in packed)


def test_fp8_is_refused_on_the_cpu(checkpoint: Checkpoint) -> None:
    with pytest.raises(StartupError, match="linearDtype 'fp8': deviceType 'cpu' does not compute in it"):
        Harness(checkpoint("llama")[0], replace(MODEL, linear_dtype="fp8"))
