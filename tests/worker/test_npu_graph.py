"""How a decode step is laid out for a captured graph; what graphs compute is shown in tests/npu_sim."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.platforms.npu_graph import LARGEST, DecodeGraphs, StaticStep, graph_sizes, pack_step

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


@given(st.integers(1, 1000))
def test_sizes_rise_to_the_largest_batch_and_are_few(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and len(sizes) <= 20
    assert sizes[-1] == min(max_rows, LARGEST)
    # nobody pays for more than as many rows again, nor for more than 16
    assert all(larger - smaller <= min(smaller, 16) for smaller, larger in pairwise(sizes))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 20))
def test_a_step_is_filled_up_with_rows_that_touch_nobodys_blocks(contexts: list[int], more: int) -> None:
    plan = decode_plan(contexts)
    taken, rows, width = len(contexts), len(contexts) + more, 5
    packed, lengths = pack_step(plan, rows, width, NUM_BLOCKS, BLOCK_SIZE)
    step = StaticStep(torch.from_numpy(packed), rows, width)
    batch = step.batch(lengths)

    assert batch.input_ids[:taken].tolist() == plan.input_ids.tolist()
    assert batch.positions[:taken].tolist() == plan.positions.tolist()
    assert batch.slots[:taken].tolist() == plan.slot_mapping.tolist()
    assert lengths.tolist() == [*contexts, *[1] * more]
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


@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.PREFILL])
def test_nothing_is_served_before_a_capture(kind: StepKind) -> None:
    graphs = DecodeGraphs(None, max_rows=20, max_seq_len=33, block_size=BLOCK_SIZE)
    assert graphs.spare_blocks == 3
    plan = decode_plan([4, 9])
    assert not graphs.serves(replace(plan, kind=kind))
