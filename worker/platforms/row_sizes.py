"""For which numbers of rows a linear layer gives a row the same bits, found by running it.

Kernels choose their order of summation by the shape of a product, and nothing written says how: with one row
it is often another than with two, and on some machines it changes at other numbers. The order shows in the
last bits only, so the probe multiplies rows of which many results nearly cancel: what is left is rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256)
_PROBES = 2  # rows tried
_CANCELLED = 64  # results of each that cancel
_LARGEST_PRODUCT = 2**34  # weights x rows: a vocabulary head never sees many rows


def equal_sizes(linear: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """The largest set of `SIZES`, rising, that agree to the bit at every place of a row; never empty.

    linear: x -> x weight^T + bias on [rows, in]; weight: [out, in]; bias: [out].
    """
    probes = [_revealing_row(weight, bias, seed) for seed in range(_PROBES)]
    agreeing: defaultdict[bytes, list[int]] = defaultdict(list)
    for size in SIZES:
        if size > 1 and size * weight.numel() > _LARGEST_PRODUCT:
            break
        results = torch.stack([linear(row.expand(size, -1).contiguous()) for row in probes]).view(torch.uint8)
        first = results[:, :1]
        if torch.equal(results, first.expand_as(results)):
            agreeing[first.numpy().tobytes()].append(size)
    return max(map(tuple, agreeing.values()), key=len)


def _revealing_row(weight: Tensor, bias: Tensor | None, seed: int) -> Tensor:
    """A row [in] for which up to `_CANCELLED` of the results are next to nothing."""
    out_features, in_features = weight.shape
    count = min(_CANCELLED, out_features, in_features // 2)
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(in_features, generator=generator)
    if count and bool(torch.isfinite(weight).all()):  # else nothing cancels, and nothing is to be told apart
        chosen = slice(None, count * (out_features // count), out_features // count)
        some = weight[chosen].float()
        results = some @ row
        if bias is not None:
            results += bias[chosen].float()
        row -= torch.linalg.lstsq(some, results[:, None], driver="gelsd").solution[:, 0]
    return row.to(weight.dtype)
