"""What the leader tells its ranks: nothing is lost on the way, whatever its size."""

from __future__ import annotations

import os
import threading
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineBug
from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step_channel import StepReceiver, StepSender
from engine.step_records import InstallAdapter, RemoveAdapter, decode, encode
from engine.wire.ring import RingReader, RingWriter, create_ring

BLOCK_SIZE = 4
_ARRAYS = [field.name for field in fields(StepPlan) if field.type == "Int32Array"]
_MOVES = ("copies", "swap_out", "swap_in")


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    sequences = []
    for index in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 30))
        params = SamplingParams(
            max_tokens=4,
            lora=draw(st.sampled_from(["", "a", "Adapter-ä"])),
            reproducible=draw(st.booleans()),
            prompt_logprobs=draw(st.sampled_from([-1, 0, 3])),
        )
        sequence = Sequence(index, np.arange(length, dtype=np.int32) + 100 * index, params)
        sequence.block_table = draw(st.lists(st.integers(0, 99), min_size=8, max_size=9))
        sequence.num_computed = draw(st.integers(0, length - 1))
        sequence.num_told = draw(st.integers(0, length - 1))
        sequences.append(sequence)
    moves = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 99)), max_size=3)
    samples = sequences if draw(st.booleans()) else []
    return build_plan(
        draw(st.sampled_from([StepKind.PREFILL, StepKind.DECODE])),
        sequences,
        BLOCK_SIZE,
        samples=samples,
        copies=draw(moves),
        swap_out=draw(moves),
        swap_in=draw(moves),
    )


@given(plans())
@settings(max_examples=60)
def test_a_rank_computes_the_step_the_leader_planned(plan: StepPlan) -> None:
    got = decode(encode(plan))
    assert isinstance(got, StepPlan) and got.kind is plan.kind
    for name in _ARRAYS:
        np.testing.assert_array_equal(getattr(got, name), getattr(plan, name), err_msg=name)
    for name in _MOVES:
        assert list(getattr(got, name)) == list(getattr(plan, name)), name
    assert bool(got.samples) == bool(plan.samples)
    for row, (ours, theirs) in enumerate(zip(got.sequences, plan.sequences, strict=True)):
        assert ours.params.lora == theirs.params.lora
        assert ours.params.reproducible == theirs.params.reproducible
        assert got.owed_scores(row) == plan.owed_scores(row)


def test_prompts_leave_the_leader_as_ids_of_the_step_only() -> None:
    """A decode step must not carry the text before it: its size is that of its rows."""
    sequence = Sequence(0, np.arange(3000, dtype=np.int32), SamplingParams(max_tokens=4))
    sequence.block_table = list(range(750))
    sequence.num_computed = 2999
    assert len(encode(build_plan(StepKind.DECODE, [sequence], BLOCK_SIZE))) < 4 * (750 + 40)


def test_adapters_come_and_go_by_name_and_place() -> None:
    for record in (InstallAdapter("an ädapter", "/some/where"), RemoveAdapter("x"), InstallAdapter("", "")):
        assert decode(encode(record)) == record


@pytest.mark.parametrize("data", [b"", b"\x09", bytes(12)])
def test_what_nobody_has_encoded_is_refused(data: bytes) -> None:
    with pytest.raises(EngineBug, match="unknown kind"):
        decode(data)


def test_a_step_that_is_cut_is_refused() -> None:
    sequence = Sequence(0, np.arange(9, dtype=np.int32), SamplingParams(max_tokens=4))
    sequence.block_table = [0, 1, 2]
    data = encode(build_plan(StepKind.PREFILL, [sequence], BLOCK_SIZE))
    with pytest.raises((EngineBug, ValueError)):
        decode(data[:-1])
    with pytest.raises(EngineBug, match="9 tokens in"):
        decode(data + b"x")


def test_records_of_any_length_arrive_whole_at_every_rank() -> None:
    rings = [create_ring(f"mindie_test_{os.getpid()}_step{i}", slots=3, slot_bytes=40) for i in range(2)]
    sender = StepSender([RingWriter(ring) for ring in rings], timeout_s=20.0)
    records = [os.urandom(size) for size in (1, 31, 32, 33, 64, 1000, 5)]
    got: list[list[bytes | None]] = [[], []]

    def read(rank: int) -> None:
        receiver = StepReceiver(RingReader(rings[rank]))
        got[rank] = [receiver.take(20.0) for _ in records]

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for reader in readers:
        reader.start()
    for record in records:  # the longest is many times what a ring holds
        sender.send(record)
    for reader in readers:
        reader.join(20.0)
    assert got == [records, records]


def test_a_rank_that_does_not_read_is_told_of_and_nothing_comes_out_of_nothing() -> None:
    ring = create_ring(f"mindie_test_{os.getpid()}_stuck", slots=1, slot_bytes=40)
    assert StepReceiver(RingReader(ring)).take(0.0) is None
    sender = StepSender([RingWriter(ring)], timeout_s=0.01)
    sender.send(b"fits")
    with pytest.raises(EngineBug, match="rank 1 has not read"):
        sender.send(b"does not")
