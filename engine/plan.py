"""What one step computes: the arrays every rank needs, built once per step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from engine.sequence import Sequence

Int32Array = NDArray[np.int32]


class StepKind(IntEnum):
    PREFILL = 1
    DECODE = 2  # of each row one token: the newest of its sequence, or one that is guessed to follow it
    MIXED = 3  # rows of both kinds, those of one token first


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step over R sequences and T tokens, ragged, without padding.

    The query tokens of row r are `input_ids[query_start[r]:query_start[r + 1]]`; they are the last tokens
    of a context of `context_len[r]` tokens, so position = context_len - query length + offset.
    Tokens are sampled from the last query token of a row: usually one per row, several for a prompt whose
    answer has several branches, none where further tokens of the prompt are still to come.
    """

    kind: StepKind
    sequences: Seq[Sequence]  # [R]; only the leader has them
    input_ids: Int32Array  # [T]
    positions: Int32Array  # [T]
    slot_mapping: Int32Array  # [T] block * block_size + offset, distinct
    query_start: Int32Array  # [R + 1]
    context_len: Int32Array  # [R] tokens with keys in the cache after this step
    block_table: Int32Array  # [R, B], B = longest table of the step, padded with 0
    samples: Seq[Sequence]  # [S] what is sampled for; `sequences` itself when S = R
    sample_rows: Int32Array | None = None  # [S] the row each sample reads; None: row s for sample s
    copies: Seq[tuple[int, int]] = field(default=())  # (source, destination) blocks, copied before the step
    guessed: Int32Array | None = None  # [R] of a decode step: how many tokens up to the row's own are guessed
    swap_out: Seq[tuple[int, int]] = field(default=())  # (block, host block), moved before anything else
    swap_in: Seq[tuple[int, int]] = field(default=())  # (host block, block), moved before `copies`

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_rows(self) -> int:
        return len(self.context_len)

    @property
    def num_guessed(self) -> int:
        """Rows that are guesses."""
        return 0 if self.guessed is None else int(np.count_nonzero(self.guessed))

    def owed_scores(self, row: int) -> range:
        """Places of the tokens of a prompt that this row can judge, and that nobody has been told of."""
        seq = self.sequences[row]
        if not seq.owes_prompt_scores:
            return range(0)
        end = int(self.context_len[row])
        start = end - int(self.query_start[row + 1] - self.query_start[row])
        # each position foretells the next token; the last one of the prompt what is sampled
        return range(max(start, seq.num_told) + 1, min(end + 1, seq.num_prompt))


def build_plan(
    kind: StepKind,
    sequences: Seq[Sequence],
    block_size: int,
    *,
    samples: Seq[Sequence] | None = None,
    sample_rows: Int32Array | None = None,
    copies: Seq[tuple[int, int]] = (),
    ends: Seq[int] | None = None,
    guessed: Int32Array | None = None,
    swap_out: Seq[tuple[int, int]] = (),
    swap_in: Seq[tuple[int, int]] = (),
) -> StepPlan:
    """Lay the uncomputed tokens of `sequences` out for one step; their blocks are already allocated.

    `ends`: how many tokens of each are computed by the end of the step; None: all. A sequence that guesses
    is there with its newest token, then with each guess, as if they were neighbours in a batch: keys and
    values of a layer are stored before any row looks at them.
    """
    rows = len(sequences)
    ends = [seq.num_tokens for seq in sequences] if ends is None else ends
    context_len = np.array(ends, np.int32)
    if kind is StepKind.DECODE:
        computed = context_len - 1
    else:
        computed = np.fromiter((seq.num_computed for seq in sequences), np.int32, rows)
    query_start = np.zeros(rows + 1, np.int32)
    np.cumsum(context_len - computed, out=query_start[1:])

    block_table = np.zeros((rows, max(len(seq.block_table) for seq in sequences)), np.int32)
    for row, seq in enumerate(sequences):
        block_table[row, : len(seq.block_table)] = seq.block_table

    if kind is StepKind.DECODE:
        positions = computed
        newest = zip(sequences, ends, strict=True)
        input_ids = np.fromiter((seq.tokens[end - 1] for seq, end in newest), np.int32, rows)
        row_of_token: NDArray[np.intp] = np.arange(rows)
    else:
        bounds = [(seq.num_computed, end) for seq, end in zip(sequences, ends, strict=True)]
        input_ids = np.concatenate(
            [seq.tokens[start:end] for seq, (start, end) in zip(sequences, bounds, strict=True)]
        )
        positions = np.concatenate([np.arange(start, end, dtype=np.int32) for start, end in bounds])
        row_of_token = np.repeat(np.arange(rows), context_len - computed)
    slots = block_table[row_of_token, positions // block_size] * block_size + positions % block_size
    return StepPlan(
        kind=kind,
        sequences=sequences,
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_len=context_len,
        block_table=block_table,
        samples=sequences if samples is None else samples,
        sample_rows=sample_rows,
        copies=copies,
        guessed=guessed,
        swap_out=swap_out,
        swap_in=swap_in,
    )
