"""Drawing tokens where the logits are, for rows that ask for nothing but temperature, top_k and top_p.

A row of logits is half a megabyte, and what comes of it is one number: on a device of its own memory the copy
takes longer than the drawing. The token is that of worker/sampler.py, but for roundings of the last bit and
for logits that are equal on the edge of top_k or top_p: here all of them stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling_params import SamplingParams

# logits float32 [R, vocab], p float32 [R] in [0, 1], k int32 [R] -> logits with -inf where the filters say
TopKTopP = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_TOP_K = 1024  # of the fused filter
_LIMITS = np.finfo(np.float32)
_LAST = 1 - 2.0**-22  # of a sum: what lies behind it may be rounding


class DeviceDraw:
    def __init__(self, keep: TopKTopP) -> None:
        self._keep = keep

    def takes(self, params: SamplingParams) -> bool:
        """Whether the row can be drawn here. One that must be reproducible meets one arithmetic only."""
        return (
            0 < params.top_k <= MAX_TOP_K
            and not params.greedy
            and not params.edits_logits
            and not params.min_p
            and not params.reproducible
        )

    def __call__(
        self, logits: Tensor, wanted: Sequence[SamplingParams], uniforms: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        """logits: [R, vocab], finite at their best; uniforms: [R] in [0, 1) -> tokens, [R]."""
        rows, vocab = logits.shape
        numbers = np.empty((3, rows), np.float32)
        numbers[0] = np.clip([params.temperature for params in wanted], _LIMITS.tiny, _LIMITS.max)
        numbers[1] = [params.top_p for params in wanted]
        numbers[2] = np.minimum(uniforms, _LAST)
        top_k = np.array([min(params.top_k, vocab) for params in wanted], np.int32)
        temperature, top_p, share = torch.from_numpy(numbers).to(logits.device)
        scaled = logits.float()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)).div_(temperature[:, None])
        kept = self._keep(scaled, top_p, torch.from_numpy(top_k).to(logits.device))
        sums = kept.softmax(dim=-1).cumsum(dim=-1)
        # in vocabulary order, the first token whose sum lies beyond the share
        beyond = (sums <= sums[:, -1:] * share[:, None]).sum(dim=-1)
        tokens: NDArray[np.int32] = beyond.to("cpu", torch.int32).numpy()
        return tokens
