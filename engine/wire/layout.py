"""How records lie in a ring slot. Little-endian, fixed offsets, read and written as numpy views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.outcome import Outcome
from engine.wire.sizes import PROMPT_HEADER_BYTES, TOKEN_SLOT_BYTES

PROMPT_HEADER = np.dtype([("request_id", "<u8"), ("num_tokens", "<u4"), ("reserved", "<u4")])
TOKEN_HEADER = np.dtype(
    [("step", "<u8"), ("rows", "<u4"), ("batch_size", "<u4"), ("step_us", "<u4"), ("reserved", "<u4", 3)]
)
TOKEN_ROW = np.dtype(
    [
        ("request_id", "<u8"),
        ("token", "<i4"),  # -1: none, see error
        ("queue_wait_us", "<u4"),
        ("logprob", "<f4"),
        ("branch", "<u2"),
        ("num_top", "<u2"),  # entries of this row in the table behind all rows
        ("finish", "u1"),  # FinishCode
        ("error", "u1"),  # ServerError.number, 0 = none
        ("preemptions", "u1"),  # of the request so far; more than 255 stay 255
        ("reserved", "u1"),
        ("rank", "<u4"),  # > 0: the row is about a token of the prompt, see Outcome
    ]
)
TOP_ENTRY = np.dtype([("token", "<i4"), ("logprob", "<f4")])
assert (PROMPT_HEADER.itemsize, TOKEN_HEADER.itemsize) == (PROMPT_HEADER_BYTES, 32)
assert (TOKEN_ROW.itemsize, TOP_ENTRY.itemsize) == (32, 8)

_ROOM = TOKEN_SLOT_BYTES - TOKEN_HEADER.itemsize


class TokenRow(NamedTuple):
    """A row of a token record as the endpoint reads it."""

    request_id: int
    branch: int
    token: int
    queue_wait_us: int
    finish: int
    error: int
    logprob: float
    rank: int
    preemptions: int
    top: Sequence[tuple[int, float]]


def prompt_pieces(slot_bytes: int, ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """The ids of one request cut into what fits a slot; nearly always that is one piece."""
    room = (slot_bytes - PROMPT_HEADER.itemsize) // 4
    return [ids[start : start + room] for start in range(0, len(ids), room)]


def write_prompt(slot: memoryview, request_id: int, ids: NDArray[np.int32]) -> None:
    """`ids`: one of prompt_pieces."""
    header = np.frombuffer(slot, PROMPT_HEADER, 1)
    header["request_id"] = request_id
    header["num_tokens"] = len(ids)
    np.frombuffer(slot, np.int32, len(ids), PROMPT_HEADER.itemsize)[:] = ids


def read_prompt(slot: memoryview) -> tuple[int, NDArray[np.int32]]:
    """Request id and a copy of the ids in this slot."""
    header = np.frombuffer(slot, PROMPT_HEADER, 1)[0]
    ids = np.frombuffer(slot, np.int32, int(header["num_tokens"]), PROMPT_HEADER.itemsize)
    return int(header["request_id"]), ids.copy()


def token_records(outcomes: Sequence[Outcome]) -> Iterator[Sequence[Outcome]]:
    """Cut one step's outcomes into what fits a slot; nearly always that is one piece."""
    if len(outcomes) * TOKEN_ROW.itemsize <= _ROOM and not any(outcome.top for outcome in outcomes):
        yield outcomes
        return
    start = used = 0
    for index, outcome in enumerate(outcomes):
        size = TOKEN_ROW.itemsize + len(outcome.top) * TOP_ENTRY.itemsize
        if used + size > _ROOM:
            yield outcomes[start:index]
            start, used = index, 0
        used += size
    yield outcomes[start:]


def write_tokens(
    slot: memoryview, step: int, batch_size: int, step_us: int, outcomes: Sequence[Outcome]
) -> None:
    header = np.frombuffer(slot, TOKEN_HEADER, 1)
    header["step"], header["rows"], header["batch_size"], header["step_us"] = (
        step, len(outcomes), batch_size, step_us,
    )  # fmt: skip
    rows = np.frombuffer(slot, TOKEN_ROW, len(outcomes), TOKEN_HEADER.itemsize)
    rows["request_id"] = [o.request_id for o in outcomes]
    rows["branch"] = [o.branch for o in outcomes]
    rows["token"] = [o.token for o in outcomes]
    rows["queue_wait_us"] = [min(o.queue_wait_us, 0xFFFFFFFF) for o in outcomes]
    rows["finish"] = [o.finish for o in outcomes]
    rows["error"] = [o.error.number if o.error else 0 for o in outcomes]
    rows["logprob"] = [o.logprob for o in outcomes]
    rows["preemptions"] = [min(o.preemptions, 0xFF) for o in outcomes]
    rows["rank"] = [o.rank for o in outcomes]
    rows["num_top"] = [len(o.top) for o in outcomes]
    entries = [entry for o in outcomes for entry in o.top]
    if entries:
        table = np.frombuffer(slot, TOP_ENTRY, len(entries), TOKEN_HEADER.itemsize + rows.nbytes)
        table["token"], table["logprob"] = zip(*entries, strict=True)


def read_tokens(slot: memoryview) -> tuple[int, list[TokenRow]]:
    """Batch size of the step, and its rows."""
    header = np.frombuffer(slot, TOKEN_HEADER, 1)[0]
    rows = np.frombuffer(slot, TOKEN_ROW, int(header["rows"]), TOKEN_HEADER.itemsize)
    num_top = rows["num_top"].tolist()
    entries = np.frombuffer(slot, TOP_ENTRY, sum(num_top), TOKEN_HEADER.itemsize + rows.nbytes).tolist()
    names = (
        "request_id", "branch", "token", "queue_wait_us", "finish", "error", "logprob", "rank", "preemptions",
    )  # fmt: skip
    columns = [rows[name].tolist() for name in names]
    read, start = [], 0
    for *values, count in zip(*columns, num_top, strict=True):
        read.append(TokenRow._make((*values, entries[start : start + count])))
        start += count
    return int(header["batch_size"]), read
