"""How weights lie for the compiled kernels: in panels of 32 outputs, a few inputs of each together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from worker.native.library import empty_in_huge_pages

PANEL = 32  # outputs; linear.h


def to_panels(weight: Tensor, group: int, multiple: int) -> Tensor:
    """[out, in] -> [out / 32, in / group, 32, group], both filled up with zeros; a copy.

    `multiple`: of which the number of inputs becomes one, itself one of `group`.
    """
    outputs, inputs = weight.shape
    panels, steps = -(-outputs // PANEL), -(-inputs // multiple) * multiple // group
    packed = empty_in_huge_pages((panels, steps, PANEL, group), weight.dtype)
    for first, last in ((0, outputs // PANEL), (outputs // PANEL, panels)):
        part = weight[first * PANEL : last * PANEL]
        missing = (steps * group - inputs, (last - first) * PANEL - len(part))
        if any(missing):
            part = functional.pad(part, (0, missing[0], 0, missing[1]))
        packed[first:last] = part.view(-1, PANEL, steps, group).permute(0, 2, 1, 3)
    return packed


def dense_from_panels(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight [outputs, inputs] that `to_panels` was given; a copy."""
    panels, steps, panel, group = packed.shape
    rows = packed.permute(0, 2, 1, 3).reshape(panels * panel, steps * group)
    return rows[:outputs, :inputs].contiguous()


def rows_of_panels(packed: Tensor, outputs: Tensor, inputs: int) -> Tensor:
    """What `dense_from_panels` gives, of some outputs only, int [n] -> [n, inputs]."""
    panels = torch.div(outputs, PANEL, rounding_mode="floor")
    rows = packed[panels, :, outputs - panels * PANEL]
    return rows.flatten(1)[:, :inputs].contiguous()
