"""The filter of logits that tokens are drawn from, out of torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.device_draw import MAX_TOP_K


def keep_top_k_top_p(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """See `TopKTopP`. Sees the largest MAX_TOP_K, whatever is asked: nobody waits for the device."""
    best = logits.topk(min(MAX_TOP_K, logits.shape[-1]), dim=-1).values
    place = torch.arange(best.shape[-1], device=logits.device)
    inside = best.masked_fill(place >= top_k[:, None], -torch.inf)
    shares = inside.softmax(dim=-1)
    # what comes before a token decides, so that the best one always stays
    before = shares.cumsum(dim=-1) - shares
    kept = (before < top_p[:, None]) & (place < top_k[:, None])
    last = kept.sum(dim=-1, keepdim=True).sub_(1).clamp_min_(0)
    return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)
