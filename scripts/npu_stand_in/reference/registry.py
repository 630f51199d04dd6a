"""Operator -> the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

REFERENCES: dict[str, Callable[..., Any]] = {}  # "npu::npu_rms_norm" and so on; arguments are the schema's

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


class OutsideLimits(RuntimeError):
    """The operator's description excludes this call."""


def computes(name: str) -> Callable[[Function], Function]:
    """Registers the function under the operator's name."""

    def register(function: Function) -> Function:
        REFERENCES[f"npu::{name}"] = function
        return function

    return register


def require(operator: str, holds: bool, what: str) -> None:
    """Raises OutsideLimits, naming the operator, when a stated limit does not hold."""
    if not holds:
        raise OutsideLimits(f"{operator}: {what}")


def require_type(operator: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(operator, tensor.dtype in allowed, f"{name} is {tensor.dtype}, and may be {names}")


def require_defaults(operator: str, others: Mapping[str, object]) -> None:
    """Raises OutsideLimits for an argument that is given, and not as None, 0, False or -1."""
    given = [
        name for name, value in others.items() if isinstance(value, Tensor) or value not in (None, 0, -1, "")
    ]
    require(operator, not given, f"not modelled: {', '.join(given)}")


# As torch numbers its types: so do `dtype` arguments arrive that the schema declares as int.
_NUMBERED = {
    1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 12: torch.qint8, 15: torch.bfloat16,
}  # fmt: skip


def numbered_type(operator: str, number: int | torch.dtype | None) -> torch.dtype | None:
    """The type an argument of the schema's type `int?` means."""
    if number is None or isinstance(number, torch.dtype):
        return number
    require(operator, number in _NUMBERED, f"type number {number} is not one of {sorted(_NUMBERED)}")
    return _NUMBERED[number]
