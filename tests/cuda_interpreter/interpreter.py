"""Triton's interpreter as the kernels need it. Imported first; TRITON_INTERPRET=1 has been set by then."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

assert knobs.runtime.interpret, "run these through tests/cuda_interpreter/test_kernels.py"

_ROUNDED = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
_convert_float = interpreter._convert_float


def _rounded(given: Any, source: Any, target: Any, mode: Any) -> Any:
    """The interpreter cuts off what chips round to the nearest."""
    if source != tl.float32 or target not in _ROUNDED:
        return _convert_float(given, source, target, mode)
    dtype, bits = _ROUNDED[target]
    return torch.from_numpy(np.array(given, np.float32)).to(dtype).view(bits).numpy()


interpreter._convert_float = _rounded

_builder = interpreter.InterpreterBuilder
_create_dot = _builder.create_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = _convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as 16-bit whole numbers, and multiplies these."""
    return _create_dot(self, _widened(a), _widened(b), *rest)


_builder.create_dot = _dot
