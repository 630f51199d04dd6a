"""One step as the model sees it: the plan's arrays on the device, moved there once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plan import Int32Array, StepPlan


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


def make_batch(plan: StepPlan, device: torch.device) -> Batch:
    rows = plan.num_rows
    one_token_per_row = plan.num_tokens == rows
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
    )
