"""The compiled kernels as ctypes sees them: loaded once, or found missing with one line in the log.

ctypes and no extension of torch: that would bind to one release of torch and take a minute to compile, for a
call of the same 2 us. torch is imported first and its libgomp is the one that the library finds: there is one
pool of threads, and torch.set_num_threads governs it.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from worker.native.build import library_path

log = logging.getLogger("llm.platform")

WEIGHTS_F32, WEIGHTS_BF16, WEIGHTS_BF16_DOT, WEIGHTS_S8 = range(4)
IS_BF16 = {torch.float32: 0, torch.bfloat16: 1}
_HUGE_PAGE = 2 * 2**20
_SMALL = 2**20  # bytes below which it does not matter, and an adapter's layers come and go
_CHUNK = 64 * 2**20
_ALIGNMENT = 64  # bytes; torch's own on the CPU
_MADV_HUGEPAGE = 14

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class LinearStruct(ctypes.Structure):
    """struct Linear of kernels.h."""

    _fields_ = (
        ("weight", _POINTER),
        ("scale", _POINTER),
        ("correction", _POINTER),
        ("bias", _POINTER),
        ("in_features", _INT64),
        ("out_features", _INT64),
        ("weights", _INT32),
        ("input_scale", _FLOAT),
        ("input_offset", _FLOAT),
    )


class AttentionStruct(ctypes.Structure):
    """struct Attention of kernels.h."""

    _fields_ = (
        ("num_heads", _INT64),
        ("num_kv_heads", _INT64),
        ("head_dim", _INT64),
        ("block_size", _INT64),
        ("window", _INT64),
    )


class StepStruct(ctypes.Structure):
    """struct Step of kernels.h."""

    _fields_ = (
        ("slots", _POINTER),
        ("query_start", _POINTER),
        ("context_len", _POINTER),
        ("table", _POINTER),
        ("table_width", _INT64),
        ("rows", _INT64),
    )


class Kernels(ctypes.Structure):
    """struct Kernels of kernels.h. The functions check nothing."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("has_bf16_dot", _INT32),
        ("has_int8_dot", _INT32),
        ("bf16_inputs", _INT32),
        ("int8_inputs", _INT32),
        ("linear", ctypes.CFUNCTYPE(_INT32, _POINTER, _POINTER, _INT64, _POINTER, _INT64, _INT32)),
        ("attention", ctypes.CFUNCTYPE(_INT32, *[_POINTER] * 5, *[_INT64] * 3, *[_POINTER] * 3, _INT32)),
        (
            "add_rms_norm",
            ctypes.CFUNCTYPE(None, *[_POINTER] * 3, _FLOAT, _INT64, _INT64, _POINTER, _INT32),
        ),
        ("silu_mul", ctypes.CFUNCTYPE(None, _POINTER, _INT64, _INT64, _POINTER, _INT32)),
        ("rotate", ctypes.CFUNCTYPE(None, _POINTER, _INT64, *[_POINTER] * 2, *[_INT64] * 3, _INT32)),
    )


@cache
def all_kernels() -> tuple[Kernels, ...]:
    """One for each instruction set that is compiled and that this processor has, best first."""
    path = library_path()
    try:
        get = ctypes.CDLL(str(path)).mindie_kernels
    except OSError as error:
        reason = "they are not built; `python worker/native/build.py` does it" if not path.exists() else error
        log.warning("no compiled kernels, torch alone computes, more slowly: %s", reason)
        return ()
    get.argtypes, get.restype = [_INT32], ctypes.POINTER(Kernels)
    return tuple(_until_null(get))


def _until_null(get: ctypes._NamedFuncPointer) -> Iterator[Kernels]:
    index = 0
    while found := get(index):
        yield found.contents
        index += 1


def kernels() -> Kernels | None:
    """The best for this processor; None: there is no library."""
    return next(iter(all_kernels()), None)


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for something large that is read from front to back again and again: 2 MiB pages where possible.

    Weights read by two threads came in at 41 GB/s instead of 23 (2 x EPYC 9004). Where the kernel knows no
    such pages the advice is without effect.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        return torch.empty(shape, dtype=dtype)
    memory = _advised(size) if size > _CHUNK // 2 else _chunks.take(size)
    return memory[:size].view(dtype).view(shape)


def _advised(size: int) -> Tensor:
    memory = torch.empty(size, dtype=torch.uint8)
    begin = -(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    whole = (memory.data_ptr() + size - begin) // _HUGE_PAGE * _HUGE_PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if whole > 0 and madvise is not None:
        madvise(_POINTER(begin), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return memory


class _Chunks:
    """Neighbours share the page in which one ends and the other begins. What is not used costs nothing."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        filled = -(-size // _ALIGNMENT) * _ALIGNMENT
        if filled > len(self._free):
            self._free = _advised(_CHUNK)
        taken, self._free = self._free[:filled], self._free[filled:]
        return taken


_chunks = _Chunks()
