"""How a step is cut so that batch mates decide nothing about a row's arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.worker.conftest import MAX_SEQ_LEN, Harness
from worker.batch import split_plan
from worker.layers.linear import UpcastingLinear
from worker.platforms.cpu_kernels import LinearKernels

WIDE = 16


def plan_of(lengths: list[tuple[int, int]]) -> StepPlan:
    """Rows of (cached tokens, query tokens)."""
    blocks = itertools.count()
    sequences = []
    for cached, new in lengths:
        sequence = Sequence(0, np.arange(cached + new, dtype=np.int32), SamplingParams(max_tokens=1))
        sequence.num_computed = cached
        sequence.block_table = list(itertools.islice(blocks, -(-(cached + new) // 4)))
        sequences.append(sequence)
    return build_plan(StepKind.PREFILL, sequences, 4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2 * WIDE)), min_size=1, max_size=40))
def test_pieces_are_the_plan_and_a_row_is_wide_by_its_own_length_only(lengths: list[tuple[int, int]]) -> None:
    plan = plan_of(lengths)
    pieces = split_plan(plan, WIDE)
    assert [s for piece in pieces for s in piece.sequences] == list(plan.sequences)
    for name in ("input_ids", "positions", "slot_mapping", "context_len"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        assert joined.tolist() == getattr(plan, name).tolist()
    for piece in pieces:
        queries = np.diff(piece.query_start)
        assert piece.query_start[0] == 0 and piece.query_start[-1] == piece.num_tokens
        assert piece.num_rows == len(piece.block_table) < WIDE
        assert ((queries >= WIDE) == (piece.num_tokens >= WIDE)).all()


def test_a_plan_is_left_whole_where_it_can_be() -> None:
    plan = plan_of([(0, 2 * WIDE), (3, 5), (0, WIDE - 1)])
    assert split_plan(plan, None) == [plan]
    assert split_plan(plan, 10 * WIDE) == [plan]
    assert len(split_plan(plan_of([(0, WIDE), (0, 2 * WIDE), (2, WIDE)]), WIDE)) == 1


def test_no_row_needs_a_piece_of_its_own_in_a_large_decode_batch() -> None:
    pieces = split_plan(plan_of([(5, 1)] * (3 * WIDE)), WIDE)
    assert [piece.num_rows for piece in pieces] == [WIDE - 1, WIDE - 1, WIDE - 1, 3]


Checkpoint = Callable[..., tuple[Path, Any]]


def test_batch_mates_do_not_decide_whether_a_row_is_widened(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widened product is made grossly wrong here, so that taking the other one cannot go unseen."""
    monkeypatch.setattr("worker.platforms.cpu.probe_linears", lambda dtype: LinearKernels(True, True))
    monkeypatch.setattr(UpcastingLinear, "MIN_ROWS", 32)
    wide_rows: list[int] = []

    def widened(self: UpcastingLinear, x: torch.Tensor) -> torch.Tensor:
        if len(x) < self.MIN_ROWS:
            return self._narrow(x)
        wide_rows.append(len(x))
        return self._narrow(x) * 1.5

    monkeypatch.setattr(UpcastingLinear, "__call__", widened)
    folder, _ = checkpoint("llama")
    texts = [[7 * i % 199 for i in range(1, length)] for length in (12, 40, 30, 5, 50, 3)]
    together = Harness(folder)
    assert MAX_SEQ_LEN > 50
    logits = together.forward(StepKind.PREFILL, [together.sequence(text) for text in texts])
    assert set(wide_rows) == {39, 49}
    alone = Harness(folder)
    for row, text in enumerate(texts):
        want = alone.forward(StepKind.PREFILL, [alone.sequence(text)])[0]
        torch.testing.assert_close(logits[row], want, rtol=1e-4, atol=1e-4)
