"""One step as the model sees it: cut where a row's arithmetic asks for it, and moved to the device once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Int32Array, StepKind, StepPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """R rows and T query tokens.

    When every row has one query token, rows are ordered by falling context length, so that attention can
    take rows of similar length together; `last_tokens` undoes it. Lengths and tables stay on the host: nobody
    may ask a device for them.
    """

    input_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T]
    last_tokens: Tensor | None  # int32 [R] index of each plan row's last query token; None: they are 0..T-1
    query_start: Int32Array  # [R + 1]
    context_len: Int32Array  # [R]
    block_table: Int32Array  # [R, B]
    one_token_per_row: bool
    order: NDArray[np.intp] | None = None  # [R] the plan row of each row; None: they are the plan's


def make_batch(plan: StepPlan, device: torch.device) -> Batch:
    rows = plan.num_rows
    one_token_per_row = plan.num_tokens == rows
    order = None
    if one_token_per_row and (np.diff(plan.context_len) > 0).any():
        order = np.argsort(-plan.context_len, kind="stable")
        last_tokens = np.empty(rows, np.int32)
        last_tokens[order] = np.arange(rows, dtype=np.int32)
        per_token = [plan.input_ids[order], plan.positions[order], plan.slot_mapping[order], last_tokens]
        context_len, block_table = plan.context_len[order], plan.block_table[order]
    else:
        per_token = [plan.input_ids, plan.positions, plan.slot_mapping, plan.query_start[1:] - 1]
        context_len, block_table = plan.context_len, plan.block_table
    tokens = plan.num_tokens
    packed = torch.from_numpy(np.concatenate(per_token)).to(device, non_blocking=True)
    in_place = one_token_per_row and context_len is plan.context_len
    return Batch(
        input_ids=packed[:tokens],
        positions=packed[tokens : 2 * tokens],
        slots=packed[2 * tokens : 3 * tokens].long(),
        last_tokens=None if in_place else packed[3 * tokens :],
        query_start=plan.query_start,
        context_len=context_len,
        block_table=block_table,
        one_token_per_row=one_token_per_row,
        order=order,
    )


def split_plan(plan: StepPlan, wide_rows: int | None) -> list[StepPlan]:
    """The plan in pieces of consecutive rows; in its piece a row meets the linear layers it would meet alone.

    Layers that see `wide_rows` tokens or more compute in another arithmetic (None: there is only one). So a
    piece holds either rows that are as long by themselves, or fewer than `wide_rows` tokens in all. It always
    has fewer rows than that, for the vocabulary head sees one token of each. Pieces are for `make_batch`
    alone: what is sampled and copied stays that of the whole plan.
    """
    if wide_rows is None or plan.num_tokens < wide_rows:
        return [plan]
    lengths = np.diff(plan.query_start).tolist()
    pieces = []
    first, tokens = 0, lengths[0]
    for row in range(1, plan.num_rows):
        is_long = lengths[row] >= wide_rows
        same_kind = is_long == (lengths[first] >= wide_rows)
        fits = row - first + 1 < wide_rows and (is_long or tokens + lengths[row] < wide_rows)
        if not (same_kind and fits):
            pieces.append(_rows_of(plan, first, row))
            first, tokens = row, 0
        tokens += lengths[row]
    pieces.append(_rows_of(plan, first, plan.num_rows))
    return pieces


def split_by_arithmetic(plan: StepPlan, *, all_invariant: bool = False) -> list[tuple[StepPlan, bool]]:
    """The plan in pieces of consecutive rows, and whether each is computed in the batch-invariant way.

    Prompts are cut where reproducible ones meet others, which have faster ways. A decode step stays whole:
    most of its time goes into reading the weights, and two pieces would read them twice. `all_invariant`:
    every row is to be reproducible.
    """
    if all_invariant:
        return [(plan, True)]
    wanted = [sequence.params.reproducible for sequence in plan.sequences]
    if plan.kind is StepKind.DECODE or all(wanted) or not any(wanted):
        return [(plan, any(wanted))]
    bounds = [0, *(row for row in range(1, len(wanted)) if wanted[row] != wanted[row - 1]), len(wanted)]
    return [(_rows_of(plan, first, last), wanted[first]) for first, last in pairwise(bounds)]


def single_rows(plan: StepPlan) -> list[StepPlan]:
    """The plan in pieces of one row; like those of `split_plan`, but they copy what the whole plan does."""
    return [_rows_of(plan, row, row + 1) for row in range(plan.num_rows)]


def _rows_of(plan: StepPlan, first: int, last: int) -> StepPlan:
    start, end = plan.query_start[first], plan.query_start[last]
    return replace(
        plan,
        sequences=plan.sequences[first:last],
        input_ids=plan.input_ids[start:end],
        positions=plan.positions[start:end],
        slot_mapping=plan.slot_mapping[start:end],
        query_start=plan.query_start[first : last + 1] - start,
        context_len=plan.context_len[first:last],
        block_table=plan.block_table[first:last],
    )
