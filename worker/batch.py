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

    Rows of one query token come first, ordered by falling context length, so that attention can take rows of
    similar length together; `last_tokens` undoes it. Lengths and tables stay on the host: nobody may ask a
    device for them.
    """

    input_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T]
    last_tokens: Tensor | None  # int32 [R] index of each plan row's last query token; None: they are 0..T-1
    query_start: Int32Array  # [R + 1]
    context_len: Int32Array  # [R]
    block_table: Int32Array  # [R, B]
    num_single: int  # rows of one query token
    order: NDArray[np.intp] | None = None  # [R] the plan row of each row; None: they are the plan's


def make_batch(plan: StepPlan, device: torch.device) -> Batch:
    lengths = np.diff(plan.query_start)
    order = _order(plan, lengths)
    per_token = [plan.input_ids, plan.positions, plan.slot_mapping]
    context_len, block_table, query_start = plan.context_len, plan.block_table, plan.query_start
    last_tokens = query_start[1:] - 1
    if order is not None:
        query_start = np.zeros_like(plan.query_start)
        np.cumsum(lengths[order], out=query_start[1:])
        last_tokens = np.empty_like(last_tokens)
        last_tokens[order] = query_start[1:] - 1
        tokens = np.repeat(plan.query_start[:-1][order] - query_start[:-1], lengths[order])
        tokens += np.arange(plan.num_tokens, dtype=np.int32)
        per_token = [values[tokens] for values in per_token]
        context_len, block_table = context_len[order], block_table[order]
    count = plan.num_tokens
    packed = torch.from_numpy(np.concatenate([*per_token, last_tokens])).to(device, non_blocking=True)
    in_place = order is None and count == plan.num_rows
    return Batch(
        input_ids=packed[:count],
        positions=packed[count : 2 * count],
        slots=packed[2 * count : 3 * count].long(),
        last_tokens=None if in_place else packed[3 * count :],
        query_start=query_start,
        context_len=context_len,
        block_table=block_table,
        num_single=int((lengths == 1).sum()),
        order=order,
    )


def _order(plan: StepPlan, lengths: Int32Array) -> NDArray[np.intp] | None:
    """The plan's rows as a batch has them; None: as they are."""
    keys = np.where(lengths == 1, -plan.context_len, 1)
    if (np.diff(keys) >= 0).all():
        return None
    return np.argsort(keys, kind="stable")


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

    Prompts are cut where reproducible ones meet others, which have faster ways. A step that decodes stays
    whole: most of its time goes into reading the weights, and two pieces would read them twice.
    `all_invariant`: every row is to be reproducible.
    """
    if all_invariant:
        return [(plan, True)]
    wanted = [sequence.params.reproducible for sequence in plan.sequences]
    if plan.kind is not StepKind.PREFILL or all(wanted) or not any(wanted):
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
