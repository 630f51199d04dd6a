"""Scores of prompt tokens against transformers, however the step is cut, and only for who asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worker.prompt_logprobs
import worker.runner
from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.worker.conftest import BLOCK_SIZE, Harness
from worker.executor import LeaderExecutor
from worker.prompt_logprobs import PromptLogprobs
from worker.sampler import Sampler

GetCheckpoint = Callable[..., tuple[Path, Any]]
VOCAB = 199


def sequence(request_id: int, length: int, wanted: int, branch: int = 0) -> Sequence:
    ids = np.random.default_rng(request_id).integers(3, VOCAB, length).astype(np.int32)
    return Sequence(request_id, ids, SamplingParams(8, prompt_logprobs=wanted), branch=branch)


def prefill(harness: Harness, sequences: list[Sequence]) -> Any:
    free = iter(range(1000))
    for seq in sequences:
        seq.block_table = [next(free) for _ in range(-(-seq.num_tokens // BLOCK_SIZE))]
    executor = LeaderExecutor(harness.runner, Sampler(VOCAB))
    return executor.run(build_plan(StepKind.PREFILL, sequences, BLOCK_SIZE))


def expected(model: Any, seq: Sequence) -> torch.Tensor:
    """Log-probabilities of every next token, [prompt - 1, vocab]."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(seq.prompt_ids.astype(np.int64))[None]).logits[0, :-1]
    result: torch.Tensor = logits.float().log_softmax(dim=-1)
    return result


@pytest.mark.parametrize("at_once", [1, 5, 64])
@pytest.mark.parametrize("wide_rows", [None, 24])
def test_scores_equal_transformers(
    checkpoint: GetCheckpoint, monkeypatch: pytest.MonkeyPatch, at_once: int, wide_rows: int | None
) -> None:
    """`wide_rows` cuts the step into pieces of rows; `at_once` each row's product with the vocabulary."""
    folder, model = checkpoint("qwen2-tied")
    harness = Harness(folder)
    monkeypatch.setattr(worker.prompt_logprobs, "_POSITIONS_AT_ONCE", at_once)
    split = worker.runner.split_plan
    monkeypatch.setattr(worker.runner, "split_plan", lambda plan, _: split(plan, wide_rows))
    asked = [
        sequence(1, 20, 3),
        sequence(2, 9, -1),
        sequence(3, 1, 5),
        sequence(4, 30, 0),
        sequence(5, 2, 20),
    ]
    sampled = prefill(harness, asked)
    assert set(sampled.prompts) == {1, 4, 5}  # not who did not ask, nor a prompt of one token
    for seq in asked:
        scores = sampled.prompts.get(seq.request_id)
        if scores is None:
            continue
        wanted, reference = seq.params.prompt_logprobs, expected(model, seq)
        assert scores.tokens.tolist() == seq.prompt_ids[1:].tolist()
        assert scores.other_ids.shape == scores.other_logprobs.shape == (seq.num_prompt - 1, wanted)
        for position, row in enumerate(reference):
            token = int(scores.tokens[position])
            assert scores.logprobs[position] == pytest.approx(float(row[token]), abs=1e-3)
            order = row.argsort(descending=True).tolist()
            assert int(scores.ranks[position]) == 1 + order.index(token)
            others = [other for other in order if other != token][:wanted]
            assert scores.other_ids[position].tolist() == others
            assert scores.other_logprobs[position].tolist() == pytest.approx(row[others].tolist(), abs=1e-3)


def test_a_step_that_owes_nobody_gathers_nothing() -> None:
    preempted = sequence(1, 8, 5)
    preempted.num_told = preempted.num_prompt - 1
    assert PromptLogprobs.of(build_plan_of(StepKind.PREFILL, [preempted, sequence(2, 8, -1)])) is None
    assert PromptLogprobs.of(build_plan_of(StepKind.PREFILL, [preempted, sequence(2, 8, 0)])) is not None
    running = sequence(3, 8, 5)
    running.num_computed = 7
    assert PromptLogprobs.of(build_plan_of(StepKind.DECODE, [running])) is None


def build_plan_of(kind: StepKind, sequences: list[Sequence]) -> Any:
    for seq in sequences:
        seq.block_table = list(range(4))
    return build_plan(kind, sequences, BLOCK_SIZE)
