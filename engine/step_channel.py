"""The step ring: records of any length from the leader to each further rank of its instance, in order."""

from __future__ import annotations

import select
from collections.abc import Sequence
from struct import Struct

from engine.errors import EngineBug
from engine.wire.ring import RingReader, RingWriter

_PIECE = Struct("<IB3x")  # bytes in this slot; whether the record goes on in the next one


class StepSender:
    """The leader's end."""

    def __init__(self, writers: Sequence[RingWriter], timeout_s: float) -> None:
        """`writers`: of one ring for each further rank."""
        self._writers = writers
        self._timeout_s = timeout_s

    def send(self, record: bytes) -> None:
        """Raises EngineBug when a rank does not read for `timeout_s`: it hangs, and so would everybody."""
        for rank, writer in enumerate(self._writers, start=1):
            room = writer.slot_bytes - _PIECE.size
            for start in range(0, len(record), room):
                self._write(rank, writer, record[start : start + room], start + room < len(record))

    def _write(self, rank: int, writer: RingWriter, piece: bytes, goes_on: bool) -> None:
        if (slot := writer.reserve()) is None:
            writer.wait_free(self._timeout_s)
            if (slot := writer.reserve()) is None:
                raise EngineBug(f"rank {rank} has not read its ring for {self._timeout_s:.0f} s")
        _PIECE.pack_into(slot, 0, len(piece), goes_on)
        slot[_PIECE.size : _PIECE.size + len(piece)] = piece
        writer.commit()


class StepReceiver:
    """A further rank's end."""

    def __init__(self, reader: RingReader) -> None:
        self._reader = reader
        self._begun = bytearray()

    def take(self, timeout_s: float) -> bytes | None:
        """The next record; None when there is none in time."""
        while True:
            slot = self._reader.take()
            if slot is None:
                if not select.select([self._reader.fileno()], [], [], timeout_s)[0]:
                    return None
                continue
            size, goes_on = _PIECE.unpack_from(slot)
            self._begun += slot[_PIECE.size : _PIECE.size + size]
            self._reader.release()
            if not goes_on:
                record = bytes(self._begun)
                self._begun.clear()
                return record
