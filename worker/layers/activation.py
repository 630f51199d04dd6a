"""The gated activation of the Llama MLP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SERIAL = 32768  # elements; torch spreads as many over its threads, in equal shares


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 * intermediate], gate first -> [T, intermediate].

    A row's bits do not depend on T: no share of a thread ends within a row, where the elements behind the
    last whole vector would be computed with another exponential function.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    rows, width = gate.shape
    if rows * width < _SERIAL:
        return functional.silu(gate).mul_(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    # with so many rows all threads take part and get whole rows each
    unit = torch.get_num_threads() * -(-_SERIAL // width)
    shared = rows - rows % unit
    sizes = [shared] if shared else []
    few = max(1, (_SERIAL - 1) // width)
    sizes += [min(few, rows - start) for start in range(shared, rows, few)]
    for part, result in zip(torch.split(gate, sizes), torch.split(out, sizes), strict=True):
        torch.ops.aten.silu.out(part, out=result)
    return out.mul_(up)
