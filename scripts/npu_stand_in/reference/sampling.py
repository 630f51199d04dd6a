"""Filtering logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npu_stand_in.reference.registry import FLOATS, computes, require, require_type


@computes("npu_top_k_top_p")
def top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """logits: [B, V]; p: [B], 0 to 1; k: int32 [B], 1 to 1024 -> logits, -inf where filtered out."""
    name = "npu_top_k_top_p"
    require(name, logits.dim() == 2, "logits are [B, V]")
    require_type(name, "logits", logits, *FLOATS)
    require(name, p is not None or k is not None, "p or k must be given")
    values, places = logits.float().sort(stable=True, dim=-1)
    if k is not None:
        require_type(name, "k", k, torch.int32)
        most = min(1024, logits.shape[1])
        require(name, k.shape == logits.shape[:1], "k is [B]")
        require(name, not len(k) or 1 <= int(k.min()) <= int(k.max()) <= most, f"k lies in [1, {most}]")
        least = values.gather(1, (logits.shape[1] - k.long()).unsqueeze(1))
        values = values.masked_fill(values < least, -math.inf)
    if p is not None:
        require_type(name, "p", p, logits.dtype)
        require(name, p.shape == logits.shape[:1], "p is [B]")
        unlikely = values.softmax(-1).cumsum(-1) <= 1 - p.float().unsqueeze(1)
        unlikely[:, -1] = False
        values = values.masked_fill(unlikely, -math.inf)
    return torch.empty_like(values).scatter_(1, places, values).to(logits.dtype)
