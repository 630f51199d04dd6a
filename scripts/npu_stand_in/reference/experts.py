"""Mixture of experts: choosing, gathering, the grouped products, and putting together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_stand_in.reference.registry import (
    FLOATS,
    computes,
    numbered_type,
    require,
    require_defaults,
    require_type,
)


@computes("npu_moe_gating_top_k_softmax")
def moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [T, E] -> weights [T, k] as softmax has them, experts int32 [T, k], rows int32 [T, k]."""
    name = "npu_moe_gating_top_k_softmax"
    require(name, finished is None, "not modelled: finished")
    require_type(name, "x", x, *FLOATS)
    require(name, 1 <= k <= min(x.shape[-1], 1024), "k is at most E, and 1024")
    weights, experts = x.float().softmax(-1).topk(k, dim=-1)
    rows = torch.arange(weights.numel(), dtype=torch.int32).view(k, -1).t().contiguous()
    return weights.to(x.dtype), experts.int(), rows


@computes("npu_moe_gating_top_k")
def moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **other: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As above, from softmax (norm_type 0) or sigmoid (1), out of the best `k_group` of `group_count` groups.

    `bias` takes part in choosing only; sigmoid's weights are made to sum up to 1.
    """
    name = "npu_moe_gating_top_k"
    require_type(name, "x", x, *FLOATS)
    require_defaults(name, other)
    require(name, x.shape[-1] % group_count == 0, "E is a multiple of group_count")
    require(name, 1 <= k <= x.shape[-1] // group_count * k_group, "k is at most what the chosen groups hold")
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if group_count > 1:
        grouped = choice.view(len(x), group_count, -1)
        value = grouped.amax(-1) if group_select_mode == 0 else grouped.topk(2, -1).values.sum(-1)
        chosen = torch.zeros_like(value, dtype=torch.bool).scatter_(1, value.topk(k_group, -1).indices, True)
        choice = grouped.masked_fill(~chosen.unsqueeze(-1), -torch.inf).view_as(choice)
    experts = choice.topk(k, -1).indices
    weights = scores.gather(1, experts)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), scores


@computes("npu_moe_init_routing_v2")
def moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    **other: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: [T, H]; expert_idx: int32 [T, k] -> rows by expert [T * k, H], where each went, counts, scale.

    Where each went is the place of (token, choice) among the rows, -1 for experts out of range.
    """
    name = "npu_moe_init_routing_v2"
    require_type(name, "expert_idx", expert_idx, torch.int32)
    require(name, quant_mode == -1 and drop_pad_mode == 0 and row_idx_type == 0, "plain routing is modelled")
    require(name, expert_tokens_num_flag and expert_tokens_num_type == 1, "counts of tokens are modelled")
    require_defaults(name, other)
    pairs = expert_idx.numel()
    require(name, active_num in (-1, 0, pairs), "a bound below T * k is not modelled")
    first, last = active_expert_range or (0, expert_num)
    require(name, 0 <= first < last <= expert_num, "active_expert_range lies in [0, expert_num]")
    flat = expert_idx.flatten().long()
    ours = (flat >= first) & (flat < last)
    order = torch.where(ours, flat, expert_num).argsort(stable=True)[: int(ours.sum())]
    rows = x.new_zeros(pairs, x.shape[1])
    rows[: len(order)] = x[order // expert_idx.shape[1]]
    went = torch.full((pairs,), -1, dtype=torch.int32)
    went[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(flat[ours] - first, minlength=last - first)
    return rows, went, counts, torch.zeros(pairs)


@computes("npu_grouped_matmul")
def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **other: Any,
) -> list[Tensor]:
    """x: [T, K]; weight: [E, K, N]; group_list: of rows, running totals (group_list_type 0) or counts (1)."""
    name = "npu_grouped_matmul"
    require(
        name,
        len(x) == 1 and len(weight) == 1 and weight[0].dim() == 3,
        "one x and one weight [E, K, N] are modelled",
    )
    require(name, split_item in (2, 3) and group_type == 0, "split_item 2 or 3 with group_type 0 is modelled")
    require_defaults(name, other)
    require(name, group_list is not None, "group_list must be given")
    assert group_list is not None
    require_type(name, "group_list", group_list, torch.int64)
    given = group_list.tolist()
    ends = torch.tensor(given).cumsum(0).tolist() if group_list_type == 1 else given
    require(name, ends == sorted(ends) and ends[-1] <= len(x[0]), "the groups lie within the rows of x")
    to = numbered_type(name, output_dtype) or (
        torch.int8 if x[0].dtype == torch.int8 and scale is None else x[0].dtype
    )
    result = torch.zeros(len(x[0]), weight[0].shape[-1])
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = x[0][start:end].float() @ weight[0][expert].float()
        if scale:
            part = part * scale[0][expert].float()
        if per_token_scale:
            part = part * per_token_scale[0][start:end].unsqueeze(-1)
        if bias:
            part = part + bias[0][expert].float()
        result[start:end] = part
    return [result.to(to)]


@computes("npu_moe_token_unpermute")
def moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """permuted_tokens: [T * k, H]; sorted_indices: where each (token, choice) is; probs: [T, k] -> [T, H]."""
    name = "npu_moe_token_unpermute"
    require(name, not padded_mode and not restore_shape, "padding is not modelled")
    places = sorted_indices.long()
    require(
        name,
        not len(places) or 0 <= int(places.min()) <= int(places.max()) < len(permuted_tokens),
        "rows that are there",
    )
    k = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens[places].float().view(-1, k, permuted_tokens.shape[1])
    return (rows if probs is None else rows * probs.float().unsqueeze(-1)).sum(1).to(permuted_tokens.dtype)
