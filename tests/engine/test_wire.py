"""Messages survive the wire, rings keep order and never overwrite, records lie where they should."""

from __future__ import annotations

import os
import random
import select
import stat
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import msgpack
import numpy as np
import pytest
import zmq

from engine.errors import EXIT_IPC, EngineFailed, StartupError
from engine.outcome import FinishCode, Outcome
from engine.sampling_params import SamplingParams
from engine.wire import layout, sizes
from engine.wire import messages as m
from engine.wire.channel import Channel, ControlHub
from engine.wire.codec import WireError, decode, encode
from engine.wire.keepsake import Keepsake
from engine.wire.ring import RingError, RingReader, RingWriter, create_ring
from engine.wire.vitals import Vitals

_SAMPLES: dict[str, object] = {
    "int": 7,
    "float": 0.25,
    "str": "word",
    "bytes": b"\x00\xff",
    "bool": True,
    "tuple[int, ...]": (3, -1),
    "tuple[tuple[str, str], ...]": (("a", "/b"),),
    "tuple[tuple[str, bytes, int, int, int], ...]": (("a", b"\x00" * 32, 1, 2, 3),),
    "SamplingParams": SamplingParams(9, temperature=0.5, seed=2**64 - 1, stop_token_ids=(3, 4)),
}


@pytest.mark.parametrize("cls", get_args(m.Message), ids=lambda cls: cls.__name__)
def test_every_message_survives_the_wire(cls: type[m.Message]) -> None:
    message = cls(*(_SAMPLES[str(field.type)] for field in fields(cls)))
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", msgpack.packb([99]), msgpack.packb([1, 2]), msgpack.packb({"a": 1})]
)
def test_anything_else_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        decode(frame)


def test_channels_deliver_in_order(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = f"ipc://{tmp_path}/cmd"
    pull = Channel(context, zmq.PULL, address, bind=True)
    push = Channel(context, zmq.PUSH, address)
    assert push.wait_connected(5.0) and push.connected
    assert stat.S_IMODE((tmp_path / "cmd").stat().st_mode) == 0o600
    for number in range(500):
        push.send(m.Abort(number, -1))
    got: list[m.Message] = []
    while len(got) < 500:
        got.extend(pull.receive())
    assert got == [m.Abort(number, -1) for number in range(500)]
    push.close()
    pull.close()
    context.term()


def test_the_hub_tells_children_apart(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    hub = ControlHub(context, f"ipc://{tmp_path}/ctl")
    child = Channel(context, zmq.DEALER, f"ipc://{tmp_path}/ctl", identity="worker.0.0")
    assert child.wait_connected(5.0)
    child.send(m.Ready("here"))
    got: list[tuple[str, m.Message]] = []
    while not got:
        got.extend(hub.receive())
    assert got == [("worker.0.0", m.Ready("here"))]
    hub.send("worker.0.0", m.Drain(1.5))
    hub.send("nobody", m.Drain(1.5))  # dropped, no error
    answers: list[m.Message] = []
    while not answers:
        answers.extend(child.receive())
    assert answers == [m.Drain(1.5)]
    child.close()
    hub.close()
    context.term()


def _name() -> str:
    return f"mindie_test_{os.getpid()}_{random.getrandbits(64):x}"


def test_a_ring_keeps_order_and_refuses_when_full() -> None:
    ring = create_ring(_name(), slots=4, slot_bytes=64)
    writer, reader = RingWriter(ring), RingReader(ring)
    rng = random.Random(1)
    sent = received = 0
    while received < 2000:
        if rng.random() < 0.5:
            slot = writer.reserve()
            assert (slot is None) == (sent - received == 4)
            if slot is not None:
                slot[:8] = sent.to_bytes(8, "little")
                writer.commit()
                sent += 1
        else:
            view = reader.take()
            assert (view is None) == (sent == received)
            if view is not None:
                assert int.from_bytes(view[:8], "little") == received
                reader.release()
                received += 1


def test_F26_the_parent_survives_what_is_no_message_and_knows_who_sent_it(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    hub = ControlHub(context, f"ipc://{tmp_path}/ctl")
    child = context.socket(zmq.DEALER)
    child.setsockopt(zmq.IDENTITY, b"worker.0.0.7")
    child.connect(f"ipc://{tmp_path}/ctl")
    good = encode(m.Ready("here"))
    submit = msgpack.packb([1, 7, 3, 5, [], ["not", "sampling", "parameters", *[0] * 99]])
    for frames in ([b"\xc1"], [submit], [b"", b""], [good[:-1]], [good, good], [good]):
        child.send_multipart(frames)
    got: list[tuple[str, m.Message | None]] = []
    while len(got) < 6:
        got.extend(hub.receive())
    assert got == [*[("worker.0.0.7", None)] * 5, ("worker.0.0.7", m.Ready("here"))]
    child.close()
    hub.close()
    context.term()


def test_a_reset_ring_is_empty_and_starts_anew() -> None:
    ring = create_ring(_name(), slots=3, slot_bytes=16)
    old = RingWriter(ring, generation=4)
    for _ in range(2):
        assert old.reserve() is not None
        old.commit()
    ring.reset()
    writer, reader = RingWriter(ring, generation=5), RingReader(ring, generation=5)
    assert reader.take() is None
    for number in range(3):
        slot = writer.reserve()
        assert slot is not None
        slot[0] = number
        writer.commit()
    assert writer.reserve() is None
    for number in range(3):
        view = reader.take()
        assert view is not None and view[0] == number
        reader.release()


def test_room_for_several_slots_is_waited_for_without_losing_those_that_are_free() -> None:
    ring = create_ring(_name(), slots=4, slot_bytes=16)
    writer, reader = RingWriter(ring), RingReader(ring)
    assert writer.has_room(4) and not writer.has_room(5)
    for _ in range(3):
        assert writer.reserve() is not None
        writer.commit()
    assert writer.has_room(1) and not writer.has_room(2)
    assert reader.take() is not None
    reader.release()
    assert writer.has_room(2) and not writer.has_room(3)
    for _ in range(2):
        assert writer.reserve() is not None
        writer.commit()
    assert writer.reserve() is None


def test_F26_a_slot_of_an_older_generation_is_never_acted_on() -> None:
    ring = create_ring(_name(), slots=2, slot_bytes=16)
    writer, reader = RingWriter(ring, generation=1), RingReader(ring, generation=2)
    assert writer.reserve() is not None
    writer.commit()
    with pytest.raises(RingError, match="generation 1"):
        reader.take()


def test_a_child_that_has_missed_its_own_deadline_is_seen() -> None:
    vitals = Vitals(2)
    assert vitals.overdue_s(0) < 0 and vitals.overdue_s(1) < 0
    first, second = vitals.pulse(0), vitals.pulse(1)
    first.expect_within(3600.0)
    second.expect_within(-2.0)
    assert vitals.overdue_s(0) < 0 and vitals.overdue_s(1) >= 2.0
    second.rest()
    assert vitals.overdue_s(1) < 0


def test_how_full_a_ring_is_can_be_told_at_both_ends_without_a_trace() -> None:
    ring = create_ring(_name(), slots=4, slot_bytes=64)
    writer, reader = RingWriter(ring), RingReader(ring)
    assert (writer.num_used, reader.num_used) == (0, 0)
    for used in (1, 2, 3):
        assert writer.reserve() is not None
        writer.commit()
        assert (writer.num_used, reader.num_used) == (used, used)
        assert select.select([reader.fileno()], [], [], 0)[0], "the reader must still be woken"
    assert reader.take() is not None
    assert (writer.num_used, reader.num_used) == (3, 3)
    for used in (2, 1, 0):
        reader.release()
        assert (writer.num_used, reader.num_used) == (used, used)
        reader.take()


def test_what_one_worker_leaves_the_next_one_reads() -> None:
    keepsake = Keepsake()
    assert keepsake.read() == b""
    pid = os.fork()
    if pid == 0:
        keepsake.leave(b'{"torch.bfloat16": [true, false]}')
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert keepsake.read() == b'{"torch.bfloat16": [true, false]}'


def test_of_two_that_begin_together_one_finds_out_and_the_other_reads() -> None:
    keepsake = Keepsake()
    told, tell = os.pipe()
    pids = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                with keepsake.alone():
                    if not keepsake.read():
                        time.sleep(0.1)  # measuring
                        keepsake.leave(b"%d" % number)
                os.write(tell, keepsake.read())
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert os.read(told, 16) in (b"00", b"11")
    os.close(told)
    os.close(tell)


def test_a_ring_crosses_a_fork_and_leaves_nothing_in_shm() -> None:
    before = set(os.listdir("/dev/shm"))
    ring = create_ring(_name(), slots=2, slot_bytes=32)
    assert set(os.listdir("/dev/shm")) == before
    pid = os.fork()
    if pid == 0:
        writer = RingWriter(ring)
        for number in range(100):
            while (slot := writer.reserve()) is None:
                writer.wait_free(1.0)
            slot[0] = number
            writer.commit()
        os._exit(0)
    reader = RingReader(ring)
    got = []
    while len(got) < 100:
        view = reader.take()
        if view is not None:
            got.append(view[0])
            reader.release()
    assert got == list(range(100))
    assert os.waitpid(pid, 0)[1] == 0


def test_a_ring_that_cannot_fit_is_refused_with_numbers() -> None:
    size = 1 << 50
    with pytest.raises(
        StartupError, match=r"/dev/shm: \d+ MiB needed .* \d+ MiB free .*--shm-size"
    ) as caught:
        create_ring(_name(), slots=1, slot_bytes=size)
    assert caught.value.exit_code == EXIT_IPC


def test_prompt_and_token_records_round_trip() -> None:
    slot = memoryview(bytearray(sizes.prompt_slot_bytes(5)))
    layout.write_prompt(slot, 2**63 + 5, np.array([1, -2, 3, 4, 5], np.int32))
    request_id, ids = layout.read_prompt(slot)
    assert request_id == 2**63 + 5 and ids.tolist() == [1, -2, 3, 4, 5]

    outcomes = [
        Outcome(1, 0, 42, FinishCode.NONE, None, 17, cached_tokens=2**20),
        Outcome(1, 3, 7, FinishCode.EOS, None, 18, -0.5, [(7, -0.5), (9, -2.25)], preemptions=300),
        Outcome(2**63, 0, -1, FinishCode.ERROR, EngineFailed, 2**40),
        Outcome(4, 1, 5, FinishCode.NONE, None, 19, -1.5, [(5, -1.5)]),
        Outcome(5, 0, 6, FinishCode.NONE, None, 0, -9.5, [(8, -0.25)], 151_000),
    ]
    slot = memoryview(bytearray(sizes.TOKEN_SLOT_BYTES))
    layout.write_tokens(slot, 3, 2, 1500, outcomes)
    batch_size, rows = layout.read_tokens(slot)
    assert batch_size == 2
    assert rows == [
        (1, 0, 42, 17, 0, 0, 0.0, 0, 0, 2**20, ()),
        (1, 3, 7, 18, FinishCode.EOS, 0, -0.5, 0, 255, 0, [(7, -0.5), (9, -2.25)]),
        (2**63, 0, -1, 2**32 - 1, FinishCode.ERROR, EngineFailed.number, 0.0, 0, 0, 0, ()),
        (4, 1, 5, 19, 0, 0, -1.5, 0, 0, 0, [(5, -1.5)]),
        (5, 0, 6, 0, 0, 0, -9.5, 151_000, 0, 0, [(8, -0.25)]),
    ]


@pytest.mark.parametrize("num_top", [0, 20])
def test_a_step_larger_than_a_slot_is_cut_without_loss(num_top: int) -> None:
    top = [(token, -0.25 * token) for token in range(num_top)]
    outcomes = [Outcome(i, 0, i, FinishCode.NONE, None, 0, -1.0, top) for i in range(5000)]
    slot = memoryview(bytearray(sizes.TOKEN_SLOT_BYTES))
    seen = []
    for piece in layout.token_records(outcomes):
        layout.write_tokens(slot, 1, 1, 1, piece)  # raises when it does not fit
        seen += [(row.request_id, list(row.top)) for row in layout.read_tokens(slot)[1]]
    assert seen == [(i, top) for i in range(5000)]
