"""A step in the making: which tokens of which sequences, and what is sampled from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.block_manager import BlockManager
from engine.plan import StepKind, StepPlan, build_plan
from engine.sequence import Sequence, SequenceGroup
from engine.swap_space import SwapSpace


class Draft:
    """Rows in the order in which they are added, and the samples that read them."""

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._ends: list[int] = []  # tokens of each row that are computed by the end of the step
        self._samples: list[Sequence] = []
        self._sample_rows: list[int] = []
        self._guessed: list[int] = []  # of each row

    @property
    def is_empty(self) -> bool:
        return not self._rows

    def continue_all(self, group: SequenceGroup, guesses: Mapping[Sequence, int] | None = None) -> None:
        """The uncomputed tokens of every branch, and the next one of each.

        `guesses`: who guesses how many tokens behind its newest; they lie in `Sequence.tokens`, beyond its
        end. Each is a row of its own, with a next token too.
        """
        for seq in group.live:
            rows = 1 + (guesses.get(seq, 0) if guesses else 0)
            self._sample_rows += range(len(self._rows), len(self._rows) + rows)
            self._rows += [seq] * rows
            self._samples += [seq] * rows
            self._ends += range(seq.num_tokens, seq.num_tokens + rows)
            self._guessed += range(rows)

    def begin(self, group: SequenceGroup) -> None:
        """The rest of the prompt, from which all branches draw their first token."""
        live = group.live
        self._sample_rows += [len(self._rows)] * len(live)
        self._samples += live
        self.compute(group.sequences[0], group.sequences[0].num_tokens)

    def compute(self, seq: Sequence, end: int) -> None:
        """Its tokens up to the `end`-th."""
        self._rows.append(seq)
        self._ends.append(end)
        self._guessed.append(0)

    def plan(self, kind: StepKind, blocks: BlockManager, swap: SwapSpace) -> StepPlan:
        rows, samples = self._rows, self._samples
        swap_out, swap_in = swap.take_moves()
        same = len(samples) == len(rows) and samples == rows
        return build_plan(
            kind,
            rows,
            blocks.block_size,
            samples=rows if same else samples,
            sample_rows=None if same else np.array(self._sample_rows, np.int32),
            copies=blocks.take_copies(),
            ends=self._ends,
            guessed=np.array(self._guessed, np.int32) if any(self._guessed) else None,
            swap_out=swap_out,
            swap_in=swap_in,
        )
