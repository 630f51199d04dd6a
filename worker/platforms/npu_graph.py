"""Decode steps as captured graphs: one launch of the host instead of some hundred.

A graph is captured for each of a few numbers of rows and reads its inputs from tensors of its own. Lengths
are arguments of the attention on the host, so a replay hands them in anew. Rows beyond the step's are filled
up with ones that write into spare blocks behind the cache.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import StepKind, StepPlan
from worker.attention.base import AttentionBackend
from worker.attention.npu import NpuAttention
from worker.batch import Batch

log = logging.getLogger("llm.platform")

LARGEST = 256  # rows; with more, the host's launches are no longer what a step waits for
_TOLERANCE = 0.02  # of the largest logit: the same kernels on the same numbers


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture: a power of two up to 16, then multiples of 16; the last holds `max_rows`.

    Each takes streams and memory of the device, and a step of few rows pays for the rows it lacks.
    """
    most = min(max_rows, LARGEST)
    sizes = [size for size in (1, 2, 4, 8, 16) if size < most]
    sizes += range(32, most, 16) if most > 16 else []
    return [*sizes, most]


@dataclass(frozen=True, slots=True)
class StaticStep:
    """What the graph of one number of rows reads: one tensor, filled in one copy."""

    packed: Tensor  # int32 [rows * (3 + table width)]
    rows: int
    width: int  # of the block table: what a sequence of the greatest length needs

    def batch(self, lengths: NDArray[np.int32]) -> Batch:
        """lengths: [rows]."""
        ids, positions, slots = (self.packed[i * self.rows : (i + 1) * self.rows] for i in range(3))
        return Batch(
            input_ids=ids,
            positions=positions,
            slots=slots,
            last_tokens=None,
            query_start=np.arange(self.rows + 1, dtype=np.int32),
            context_len=lengths,
            block_table=np.zeros((self.rows, self.width), np.int32),  # it lies in `table`
            num_single=self.rows,
        )

    @property
    def table(self) -> Tensor:
        """int32 [rows, width]."""
        return self.packed[3 * self.rows :].view(self.rows, self.width)


def pack_step(
    plan: StepPlan, rows: int, width: int, spare_from: int, block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The step as a `StaticStep` of so many rows has it, and the lengths of its rows.

    Row r beyond the plan's sees one token, that at slot r of the spare blocks.
    """
    taken = plan.num_rows
    packed = np.zeros(rows * (3 + width), np.int32)
    for part, values in enumerate((plan.input_ids, plan.positions, plan.slot_mapping)):
        packed[part * rows : part * rows + taken] = values
    spare = np.arange(taken, rows)
    packed[2 * rows + taken : 3 * rows] = spare_from * block_size + spare
    table = packed[3 * rows :].reshape(rows, width)
    table[:taken, : plan.block_table.shape[1]] = plan.block_table
    table[taken:, 0] = spare_from + spare // block_size
    lengths = np.ones(rows, np.int32)
    lengths[:taken] = plan.context_len
    return packed, lengths


class DecodeGraphs:
    """Used in this order: `spare_blocks` behind the cache, `capture`, then `forward` where it `serves`."""

    def __init__(self, npu: Any, max_rows: int, max_seq_len: int, block_size: int) -> None:
        """`npu`: torch.npu."""
        self._npu = npu
        self._sizes = graph_sizes(max_rows)
        self._width = -(-max_seq_len // block_size)
        self._longest = max_seq_len
        self._block_size = block_size
        self.spare_blocks = -(-self._sizes[-1] // block_size)
        self._graphs: dict[int, tuple[Any, StaticStep, Tensor]] = {}

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
        assert isinstance(attention, NpuAttention)
        self._spare_from = spare_from
        pool = self._npu.graph_pool_handle()
        try:
            # the smaller ones fit into what the largest leaves of the pool
            for rows in reversed(self._sizes):
                step = StaticStep(
                    torch.zeros(rows * (3 + self._width), dtype=torch.int32, device=device), rows, self._width
                )
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
        packed, lengths = pack_step(plan, rows, self._width, self._spare_from, self._block_size)
        return self._replay(rows, packed, lengths)[: plan.num_rows]

    def _capture_one(
        self, compute: Callable[[Batch], Tensor], attention: NpuAttention, step: StaticStep, pool: Any
    ) -> tuple[Any, Tensor]:
        # room for its scratch memory is taken for these lengths, and no step has greater ones
        batch = step.batch(np.full(step.rows, self._longest, np.int32))
        self._fill(step, np.ones(step.rows, np.int32))
        attention.begin(batch, step.table, self._block_size)
        compute(batch)  # once without: what kernels prepare on first use must not be captured
        self._npu.synchronize()
        graph = self._npu.NPUGraph()
        with self._npu.graph(graph, pool=pool, capture_error_mode="thread_local", auto_dispatch_capture=True):
            logits = compute(batch)
        return graph, logits

    def _compare(self, compute: Callable[[Batch], Tensor], attention: NpuAttention, rows: int) -> None:
        """RuntimeError when replaying is not computing, with lengths other than those captured."""
        _, step, _ = self._graphs[rows]
        lengths = np.arange(rows, dtype=np.int32) % self._block_size + 1
        lengths = np.minimum(lengths, self._longest)
        packed = self._fill(step, lengths)
        attention.begin(step.batch(lengths), step.table, self._block_size)
        wanted = compute(step.batch(lengths)).float()
        got = self._replay(rows, packed, lengths).float()
        error = (got - wanted).abs().max().item()
        if not error <= _TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise RuntimeError(f"the graph of {rows} rows is off by {error:g}")

    def _fill(self, step: StaticStep, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Token r of row r into spare slot r, and the first spare block as each row's whole context."""
        rows = step.rows
        packed = np.zeros(len(step.packed), np.int32)
        packed[:rows] = np.arange(rows)
        packed[rows : 2 * rows] = lengths - 1
        packed[2 * rows : 3 * rows] = self._spare_from * self._block_size + np.arange(rows)
        packed[3 * rows :] = self._spare_from
        step.packed.copy_(torch.from_numpy(packed))
        return packed

    def _replay(self, rows: int, packed: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        graph, step, logits = self._graphs[rows]
        step.packed.copy_(torch.from_numpy(packed), non_blocking=True)
        # the attention within the graph waits for the lengths that come after
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths.tolist()}])
        return logits
