"""A step in the making: which tokens of which sequences, and what is sampled from them."""

from __future__ import annotations

import numpy as np

from engine.block_manager import BlockManager
from engine.plan import StepKind, StepPlan, build_plan
from engine.sequence import Sequence, SequenceGroup


class Draft:
    """Rows in the order in which they are added, and the samples that read them."""

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._ends: list[int] = []  # tokens of each row that are computed by the end of the step
        self._samples: list[Sequence] = []
        self._sample_rows: list[int] = []

    def continue_all(self, group: SequenceGroup) -> None:
        """The uncomputed tokens of every branch, and the next one of each."""
        live = group.live
        self._sample_rows += range(len(self._rows), len(self._rows) + len(live))
        self._rows += live
        self._ends += [seq.num_tokens for seq in live]
        self._samples += live

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

    def plan(self, kind: StepKind, blocks: BlockManager) -> StepPlan:
        rows, samples = self._rows, self._samples
        same = len(samples) == len(rows) and samples == rows
        return build_plan(
            kind,
            rows,
            blocks.block_size,
            samples=rows if same else samples,
            sample_rows=None if same else np.array(self._sample_rows, np.int32),
            copies=blocks.take_copies(),
            ends=self._ends,
        )
