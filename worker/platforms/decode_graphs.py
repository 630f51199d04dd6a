"""Decode steps as captured graphs: one launch of the host instead of some hundred.

A graph is captured for each of a few numbers of rows and reads its inputs from tensors of its own. Rows
beyond the step's are filled up with ones that write into spare blocks behind the cache.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import StepKind, StepPlan
from worker.attention.base import AttentionBackend
from worker.batch import Batch

log = logging.getLogger("llm.platform")

LARGEST = 256  # rows; with more, the host's launches are no longer what a step waits for
_PER_ROW = 4  # numbers beside its part of the block table
_TOLERANCE = 0.02  # of the largest logit: the same kernels on the same numbers


def graph_sizes(max_rows: int, stride: int) -> list[int]:
    """Numbers of rows to capture: powers of two up to `stride`, its multiples, and at last `max_rows`.

    Each takes time and memory of the device, and a step of few rows pays for the rows it lacks.
    """
    most = min(max_rows, LARGEST)
    sizes = [1 << power for power in range(stride.bit_length()) if 1 << power < most]
    sizes += range(2 * stride, most, stride)
    return [*sizes, most]


@dataclass(frozen=True, slots=True)
class StaticStep:
    """What the graph of one number of rows reads: one tensor, filled in one copy."""

    packed: Tensor  # int32 [rows * (4 + table width)]
    rows: int
    width: int  # of the block table: what a sequence of the greatest length needs

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> StaticStep:
        return cls(torch.zeros(cls.numbers(rows, width), dtype=torch.int32, device=device), rows, width)

    @staticmethod
    def numbers(rows: int, width: int) -> int:
        """Of a step of so many rows, in all."""
        return rows * (_PER_ROW + width)

    def batch(self, lengths: NDArray[np.int32]) -> Batch:
        """lengths: [rows]."""
        return Batch(
            input_ids=self._column(0),
            positions=self._column(1),
            slots=self._column(2),
            last_tokens=None,
            query_start=np.arange(self.rows + 1, dtype=np.int32),
            context_len=lengths,
            block_table=np.zeros((self.rows, self.width), np.int32),  # it lies in `table`
            num_single=self.rows,
        )

    @property
    def lengths(self) -> Tensor:
        """int32 [rows]: the context of each."""
        return self._column(3)

    @property
    def table(self) -> Tensor:
        """int32 [rows, width]."""
        return self.packed[_PER_ROW * self.rows :].view(self.rows, self.width)

    def lengths_in(self, packed: NDArray[np.int32]) -> NDArray[np.int32]:
        """[rows]: those of `packed`, which is laid out as the step is."""
        return packed[3 * self.rows : 4 * self.rows]

    def _column(self, index: int) -> Tensor:
        return self.packed[index * self.rows : (index + 1) * self.rows]


def pack_step(plan: StepPlan, rows: int, width: int, spare_from: int, block_size: int) -> NDArray[np.int32]:
    """The step as a `StaticStep` of so many rows has it.

    Row r beyond the plan's sees one token, that at slot r of the spare blocks.
    """
    taken = plan.num_rows
    packed = np.zeros(StaticStep.numbers(rows, width), np.int32)
    ids, positions, slots, lengths = packed[: _PER_ROW * rows].reshape(_PER_ROW, rows)
    ids[:taken] = plan.input_ids
    positions[:taken] = plan.positions
    slots[:taken] = plan.slot_mapping
    spare = np.arange(taken, rows)
    slots[taken:] = spare_from * block_size + spare
    lengths[:taken] = plan.context_len
    lengths[taken:] = 1
    table = packed[_PER_ROW * rows :].reshape(rows, width)
    table[:taken, : plan.block_table.shape[1]] = plan.block_table
    table[taken:, 0] = spare_from + spare // block_size
    return packed


class DecodeGraphs(ABC):
    """Used in this order: `spare_blocks` behind the cache, `capture`, then `forward` where it `serves`."""

    stride: ClassVar[int]  # between numbers of rows that have a graph

    def __init__(self, runtime: Any, max_rows: int, max_seq_len: int, block_size: int) -> None:
        """`runtime`: torch.cuda or torch.npu."""
        self._runtime = runtime
        self._sizes = graph_sizes(max_rows, self.stride)
        self._width = -(-max_seq_len // block_size)
        self._longest = max_seq_len
        self._block_size = block_size
        self.spare_blocks = -(-self._sizes[-1] // block_size)
        self._graphs: dict[int, tuple[Any, StaticStep, Tensor]] = {}

    @abstractmethod
    def _begin(self, attention: AttentionBackend, batch: Batch, step: StaticStep) -> None:
        """Let the attention read its tables from the step's own tensors."""

    @abstractmethod
    def _record(self, compute: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
        """A graph of `compute` with its memory from the pool, and what it computes into."""

    @abstractmethod
    def _replay(self, graph: Any, step: StaticStep, packed: NDArray[np.int32]) -> None:
        """Hand the step's numbers to the device and run the graph on them."""

    def capture(
        self,
        compute: Callable[[Batch], Tensor],
        attention: AttentionBackend,
        device: torch.device,
        spare_from: int,
    ) -> None:
        """Capture `compute`, which gives the logits of a batch, and compare each graph with what it captured.

        Scribbles over the spare blocks, which begin at block `spare_from`. When a capture fails or a graph
        gives something else, a warning says so and steps stay as they were.
        """
        self._spare_from = spare_from
        pool = self._runtime.graph_pool_handle()
        try:
            # the smaller ones fit into what the largest leaves of the pool
            for rows in reversed(self._sizes):
                step = StaticStep.empty(rows, self._width, device)
                graph, logits = self._capture_one(compute, attention, step, pool)
                self._graphs[rows] = graph, step, logits
                self._compare(compute, attention, rows)
        except RuntimeError as error:
            self._graphs.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("decode steps run without graphs: %s", reason)
            return
        log.info("decode steps captured for %s rows", ", ".join(map(str, self._sizes)))

    def serves(self, plan: StepPlan) -> bool:
        """Whether a graph computes all of the step."""
        return (
            bool(self._graphs)
            and plan.kind is StepKind.DECODE
            and plan.num_tokens == plan.num_rows <= self._sizes[-1]
            and plan.block_table.shape[1] <= self._width
            and not any(sequence.params.lora for sequence in plan.sequences)
        )

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits of each row, [R, vocab], in the plan's order; valid until the next step."""
        rows = self._sizes[bisect_left(self._sizes, plan.num_rows)]
        packed = pack_step(plan, rows, self._width, self._spare_from, self._block_size)
        graph, step, logits = self._graphs[rows]
        self._replay(graph, step, packed)
        return logits[: plan.num_rows]

    def _capture_one(
        self, compute: Callable[[Batch], Tensor], attention: AttentionBackend, step: StaticStep, pool: Any
    ) -> tuple[Any, Tensor]:
        # room for its scratch memory is taken for these lengths, and no step has greater ones
        batch = step.batch(np.full(step.rows, self._longest, np.int32))
        self._fill(step, np.ones(step.rows, np.int32))
        self._begin(attention, batch, step)
        compute(batch)  # once without: what kernels prepare on first use must not be captured
        self._runtime.synchronize()
        return self._record(lambda: compute(batch), pool)

    def _compare(self, compute: Callable[[Batch], Tensor], attention: AttentionBackend, rows: int) -> None:
        """RuntimeError when replaying is not computing, with lengths other than those captured."""
        graph, step, logits = self._graphs[rows]
        lengths = np.arange(rows, dtype=np.int32) % self._block_size + 1
        lengths = np.minimum(lengths, self._longest)
        packed = self._fill(step, lengths)
        batch = step.batch(lengths)
        self._begin(attention, batch, step)
        wanted = compute(batch).float()
        self._replay(graph, step, packed)
        error = (logits.float() - wanted).abs().max().item()
        if not error <= _TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise RuntimeError(f"the graph of {rows} rows is off by {error:g}")

    def _fill(self, step: StaticStep, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Token r of row r into spare slot r, and the first spare block as each row's whole context."""
        rows = step.rows
        packed = np.full(len(step.packed), self._spare_from, np.int32)
        columns = packed[: _PER_ROW * rows].reshape(_PER_ROW, rows)
        columns[0] = np.arange(rows)
        columns[1] = lengths - 1
        columns[2] = self._spare_from * self._block_size + np.arange(rows)
        columns[3] = lengths
        step.packed.copy_(torch.from_numpy(packed))
        return packed
