"""How records lie in a ring slot: little-endian, fixed offsets.

Ids of prompts are numpy views. Rows of tokens are packed one by one: with a handful of them, which is most
steps, that takes a tenth of the time of numpy's columns, and with hundreds half of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.outcome import Outcome
from engine.wire.sizes import PROMPT_HEADER_BYTES, TOKEN_SLOT_BYTES

PROMPT_HEADER = Struct("<QI4x")  # request_id, number of ids
TOKEN_HEADER = Struct("<QIII12x")  # step, rows, batch_size, step_us
# request_id; token, -1: none, see error; queue_wait_us; logprob; branch; entries of this row in the table
# behind all rows; finish (FinishCode); error (ServerError.number, 0: none); preemptions of the request so
# far, more than 255 stay 255; rank, > 0: the row is about a token of the prompt, see Outcome; tokens of the
# prompt that the prefix cache had
TOKEN_ROW = Struct("<QiIfHHBBBxII4x")
TOP_ENTRY = Struct("<if")  # token, logprob
assert (PROMPT_HEADER.size, TOKEN_HEADER.size) == (PROMPT_HEADER_BYTES, 32)
assert (TOKEN_ROW.size, TOP_ENTRY.size) == (40, 8)

_ROOM = TOKEN_SLOT_BYTES - TOKEN_HEADER.size


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
    cached_tokens: int
    top: Sequence[tuple[int, float]]


def prompt_pieces(slot_bytes: int, ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """The ids of one request cut into what fits a slot; nearly always that is one piece."""
    room = (slot_bytes - PROMPT_HEADER.size) // 4
    return [ids[start : start + room] for start in range(0, len(ids), room)]


def write_prompt(slot: memoryview, request_id: int, ids: NDArray[np.int32]) -> None:
    """`ids`: one of prompt_pieces."""
    PROMPT_HEADER.pack_into(slot, 0, request_id, len(ids))
    np.frombuffer(slot, np.int32, len(ids), PROMPT_HEADER.size)[:] = ids


def read_prompt(slot: memoryview) -> tuple[int, NDArray[np.int32]]:
    """Request id and a copy of the ids in this slot."""
    request_id, num_tokens = PROMPT_HEADER.unpack_from(slot)
    return request_id, np.frombuffer(slot, np.int32, num_tokens, PROMPT_HEADER.size).copy()


def token_records(outcomes: Sequence[Outcome]) -> Iterator[Sequence[Outcome]]:
    """Cut one step's outcomes into what fits a slot; nearly always that is one piece."""
    if len(outcomes) * TOKEN_ROW.size <= _ROOM and not any(outcome.top for outcome in outcomes):
        yield outcomes
        return
    start = used = 0
    for index, outcome in enumerate(outcomes):
        size = TOKEN_ROW.size + len(outcome.top) * TOP_ENTRY.size
        if used + size > _ROOM:
            yield outcomes[start:index]
            start, used = index, 0
        used += size
    yield outcomes[start:]


def write_tokens(
    slot: memoryview, step: int, batch_size: int, step_us: int, outcomes: Sequence[Outcome]
) -> None:
    TOKEN_HEADER.pack_into(slot, 0, step, len(outcomes), batch_size, step_us)
    at = TOKEN_HEADER.size
    for o in outcomes:
        TOKEN_ROW.pack_into(
            slot,
            at,
            o.request_id,
            o.token,
            min(o.queue_wait_us, 0xFFFFFFFF),
            o.logprob,
            o.branch,
            len(o.top),
            o.finish,
            o.error.number if o.error else 0,
            min(o.preemptions, 0xFF),
            o.rank,
            o.cached_tokens,
        )
        at += TOKEN_ROW.size
    for o in outcomes:
        for entry in o.top:
            TOP_ENTRY.pack_into(slot, at, *entry)
            at += TOP_ENTRY.size


def read_tokens(slot: memoryview) -> tuple[int, list[TokenRow]]:
    """Batch size of the step, and its rows."""
    _, num_rows, batch_size, _ = TOKEN_HEADER.unpack_from(slot)
    at = TOKEN_HEADER.size + num_rows * TOKEN_ROW.size
    rows = []
    for (
        request_id,
        token,
        queue_wait_us,
        logprob,
        branch,
        num_top,
        finish,
        error,
        preemptions,
        rank,
        cached_tokens,
    ) in TOKEN_ROW.iter_unpack(slot[TOKEN_HEADER.size : at]):
        top: Sequence[tuple[int, float]] = ()
        if num_top:
            end = at + num_top * TOP_ENTRY.size
            top, at = list(TOP_ENTRY.iter_unpack(slot[at:end])), end
        rows.append(
            TokenRow(
                request_id,
                branch,
                token,
                queue_wait_us,
                finish,
                error,
                logprob,
                rank,
                preemptions,
                cached_tokens,
                top,
            )
        )
    return batch_size, rows
