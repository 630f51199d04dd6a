"""How a decode step is laid out for a captured graph; what graphs compute is shown in tests/npu_sim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionBackend
from worker.batch import Batch
from worker.platforms.decode_graphs import LARGEST, DecodeGraphs, StaticStep, graph_sizes, pack_step
from worker.platforms.npu_graph import NpuDecodeGraphs

BLOCK_SIZE = 8
NUM_BLOCKS = 40  # of the cache; spare ones lie behind


def decode_plan(contexts: list[int]) -> StepPlan:
    blocks = iter(np.random.default_rng(1).permutation(NUM_BLOCKS).tolist())
    sequences = []
    for context in contexts:
        sequence = Sequence(0, np.arange(context, dtype=np.int32), SamplingParams(max_tokens=1))
        sequence.block_table = [next(blocks) for _ in range(-(-context // BLOCK_SIZE))]
        sequences.append(sequence)
    return build_plan(StepKind.DECODE, sequences, BLOCK_SIZE)


@given(st.integers(1, 1000), st.sampled_from([8, 16]))
def test_sizes_rise_to_the_largest_batch_and_are_few(max_rows: int, stride: int) -> None:
    sizes = graph_sizes(max_rows, stride)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and len(sizes) <= 4 + LARGEST // stride
    assert sizes[-1] == min(max_rows, LARGEST)
    # nobody pays for more than as many rows again, nor for more than the stride
    assert all(larger - smaller <= min(smaller, stride) for smaller, larger in pairwise(sizes))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 20))
def test_a_step_is_filled_up_with_rows_that_touch_nobodys_blocks(contexts: list[int], more: int) -> None:
    plan = decode_plan(contexts)
    taken, rows, width = len(contexts), len(contexts) + more, 5
    packed = pack_step(plan, rows, width, NUM_BLOCKS, BLOCK_SIZE)
    step = StaticStep(torch.from_numpy(packed), rows, width)
    lengths = step.lengths_in(packed)
    batch = step.batch(lengths)

    assert batch.input_ids[:taken].tolist() == plan.input_ids.tolist()
    assert batch.positions[:taken].tolist() == plan.positions.tolist()
    assert batch.slots[:taken].tolist() == plan.slot_mapping.tolist()
    assert step.lengths.tolist() == lengths.tolist() == [*contexts, *[1] * more]
    for row, context in enumerate(contexts):
        used = -(-context // BLOCK_SIZE)
        assert step.table[row, :used].tolist() == plan.block_table[row, :used].tolist()

    slots = batch.slots.tolist()
    assert len(set(slots)) == rows, "two rows would write into one slot"
    assert all(slot >= NUM_BLOCKS * BLOCK_SIZE for slot in slots[taken:])
    # each of them sees the one token it writes
    assert [slot // BLOCK_SIZE for slot in slots[taken:]] == step.table[taken:, 0].tolist()
    spare_blocks = -(-rows // BLOCK_SIZE)
    assert int(step.table.max()) < NUM_BLOCKS + spare_blocks and int(step.table.min()) >= 0


class Replayed(DecodeGraphs):
    """A "graph" is the very function, which is run again and writes where it wrote before."""

    stride = 8
    error = 0.0  # of a replay

    def _begin(self, attention: AttentionBackend, batch: Batch, step: StaticStep) -> None:
        del attention, batch
        self.begun = step

    def _record(self, compute: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
        logits = compute()
        return (lambda: logits.copy_(compute() + self.error)), logits

    def _replay(self, graph: Any, step: StaticStep, packed: NDArray[np.int32]) -> None:
        step.packed.copy_(torch.from_numpy(packed))
        self.begun = step
        graph()


RUNTIME = SimpleNamespace(graph_pool_handle=object, synchronize=lambda: None)
ATTENTION = cast(AttentionBackend, None)  # `Replayed` asks nothing of it


def replayed(error: float = 0.0) -> Replayed:
    """Its logits of a row: token, position, slot, length and first block."""
    graphs = Replayed(RUNTIME, max_rows=20, max_seq_len=33, block_size=BLOCK_SIZE)
    graphs.error = error

    def compute(batch: Batch) -> Tensor:
        step = graphs.begun
        columns = (batch.input_ids, batch.positions, batch.slots, step.lengths, step.table[:, 0])
        return torch.stack(columns, dim=1).float()

    graphs.capture(compute, ATTENTION, torch.device("cpu"), NUM_BLOCKS)
    return graphs


@pytest.mark.parametrize("contexts", [[4], [9, 1, 30], [7] * 9, [3] * 20])
def test_a_replay_reads_the_step_that_it_is_given(contexts: list[int]) -> None:
    graphs, plan = replayed(), decode_plan(contexts)
    assert graphs.serves(plan)
    want = (plan.input_ids, plan.positions, plan.slot_mapping, plan.context_len, plan.block_table[:, 0])
    assert np.array_equal(graphs.forward(plan).numpy(), np.stack(want, axis=1))


def test_a_step_without_a_graph_is_not_served() -> None:
    graphs = replayed()
    assert graphs.serves(decode_plan([5] * 20)) and not graphs.serves(decode_plan([5] * 21))
    assert not graphs.serves(replace(decode_plan([4, 9]), kind=StepKind.PREFILL))
    assert not graphs.serves(decode_plan([41]))


@pytest.mark.parametrize("error", [50.0, float("nan")])
def test_a_graph_that_gives_something_else_is_not_used(
    caplog: pytest.LogCaptureFixture, error: float
) -> None:
    graphs = replayed(error)
    assert not graphs.serves(decode_plan([4]))
    assert f"without graphs: the graph of 20 rows is off by {error:g}" in caplog.text


@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.PREFILL])
def test_nothing_is_served_before_a_capture(kind: StepKind) -> None:
    graphs = NpuDecodeGraphs(None, max_rows=20, max_seq_len=33, block_size=BLOCK_SIZE)
    assert graphs.spare_blocks == 3
    plan = decode_plan([4, 9])
    assert not graphs.serves(replace(plan, kind=kind))
