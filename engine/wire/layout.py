"""How records lie in a ring slot. Little-endian, fixed offsets, read and written as numpy views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.outcome import Outcome

PROMPT_HEADER = np.dtype([("request_id", "<u8"), ("num_tokens", "<u4"), ("reserved", "<u4")])
TOKEN_HEADER = np.dtype(
    [("step", "<u8"), ("rows", "<u4"), ("batch_size", "<u4"), ("step_us", "<u4"), ("reserved", "<u4", 3)]
)
TOKEN_ROW = np.dtype(
    [
        ("request_id", "<u8"),
        ("token", "<i4"),  # -1: none, see error
        ("queue_wait_us", "<u4"),
        ("finish", "u1"),  # FinishCode
        ("error", "u1"),  # ServerError.number, 0 = none
        ("reserved", "u1", 14),
    ]
)
assert (PROMPT_HEADER.itemsize, TOKEN_HEADER.itemsize, TOKEN_ROW.itemsize) == (16, 32, 32)

PROMPT_SLOTS = 64
TOKEN_SLOTS = 256
TOKEN_SLOT_BYTES = 64 * 1024
ROWS_PER_SLOT = (TOKEN_SLOT_BYTES - TOKEN_HEADER.itemsize) // TOKEN_ROW.itemsize


def prompt_slot_bytes(max_prompt_tokens: int) -> int:
    return PROMPT_HEADER.itemsize + 4 * max_prompt_tokens


def write_prompt(slot: memoryview, request_id: int, ids: NDArray[np.int32]) -> None:
    header = np.frombuffer(slot, PROMPT_HEADER, 1)
    header["request_id"] = request_id
    header["num_tokens"] = len(ids)
    np.frombuffer(slot, np.int32, len(ids), PROMPT_HEADER.itemsize)[:] = ids


def read_prompt(slot: memoryview) -> tuple[int, NDArray[np.int32]]:
    """Request id and a copy of its prompt's ids."""
    header = np.frombuffer(slot, PROMPT_HEADER, 1)[0]
    ids = np.frombuffer(slot, np.int32, int(header["num_tokens"]), PROMPT_HEADER.itemsize)
    return int(header["request_id"]), ids.copy()


def token_records(outcomes: Sequence[Outcome]) -> Iterator[Sequence[Outcome]]:
    """Cut one step's outcomes into what fits a slot; nearly always that is one piece."""
    for start in range(0, len(outcomes), ROWS_PER_SLOT):
        yield outcomes[start : start + ROWS_PER_SLOT]


def write_tokens(
    slot: memoryview, step: int, batch_size: int, step_us: int, outcomes: Sequence[Outcome]
) -> None:
    header = np.frombuffer(slot, TOKEN_HEADER, 1)
    header["step"], header["rows"], header["batch_size"], header["step_us"] = (
        step, len(outcomes), batch_size, step_us,
    )  # fmt: skip
    rows = np.frombuffer(slot, TOKEN_ROW, len(outcomes), TOKEN_HEADER.itemsize)
    rows["request_id"] = [o.request_id for o in outcomes]
    rows["token"] = [o.token for o in outcomes]
    rows["queue_wait_us"] = [min(o.queue_wait_us, 0xFFFFFFFF) for o in outcomes]
    rows["finish"] = [o.finish for o in outcomes]
    rows["error"] = [o.error.number if o.error else 0 for o in outcomes]


def read_tokens(slot: memoryview) -> tuple[int, list[tuple[int, int, int, int, int]]]:
    """Batch size of the step, and rows (request_id, token, queue_wait_us, finish, error)."""
    header = np.frombuffer(slot, TOKEN_HEADER, 1)[0]
    rows = np.frombuffer(slot, TOKEN_ROW, int(header["rows"]), TOKEN_HEADER.itemsize)
    columns = (rows["request_id"], rows["token"], rows["queue_wait_us"], rows["finish"], rows["error"])
    return int(header["batch_size"]), list(zip(*(column.tolist() for column in columns), strict=True))
