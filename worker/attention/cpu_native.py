"""Paged attention on the CPU through our own compiled kernel."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from worker.attention.base import AttentionSpec
from worker.batch import Batch
from worker.kv_pages import KvPages
from worker.native.library import IS_BF16, AttentionStruct, Kernels, StepStruct, kernels

_DIM_MULTIPLE = 16  # of head_dim: keys are transposed in squares of vectors


def kernels_for(spec: AttentionSpec) -> Kernels | None:
    """What can run these shapes, at a speed that makes it worth while."""
    compiled = kernels()
    if compiled is None or compiled.name == b"plain" or spec.dtype not in IS_BF16 or spec.int8_cache:
        return None
    return None if spec.head_dim % _DIM_MULTIPLE else compiled


class CpuNativeAttention:
    """Decode and chunks alike, straight from the cache; cpu_paged is its twin.

    The bits of a query's result depend on that query and its keys alone: it takes its keys in the same
    portions whatever else is computed, and whatever the number of threads.
    """

    def __init__(self, spec: AttentionSpec, compiled: Kernels | None = None) -> None:
        """ValueError where `kernels_for` has none and none is given."""
        compiled = compiled or kernels_for(spec)
        if compiled is None:
            raise ValueError(f"no compiled attention for {spec}")
        self._width = spec.num_heads * spec.head_dim
        self._is_bf16 = IS_BF16[spec.dtype]
        self._shape = AttentionStruct(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, window=spec.window or 0
        )
        self._step = StepStruct()
        self._shape_address, self._step_address = map(ctypes.addressof, (self._shape, self._step))
        self._run = compiled.attention

    def begin_step(self, batch: Batch, block_size: int) -> None:
        self._shape.block_size = block_size
        self._held = (
            batch.slots,
            np.ascontiguousarray(batch.query_start, np.int32),
            np.ascontiguousarray(batch.context_len, np.int32),
            np.ascontiguousarray(batch.block_table, np.int32),
        )
        slots, query_start, context_len, table = self._held
        step = self._step
        step.slots = slots.data_ptr()
        step.query_start, step.context_len, step.table = (
            array.ctypes.data for array in (query_start, context_len, table)
        )
        step.rows, step.table_width = table.shape

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        assert isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)  # see kernels_for
        out = q.new_empty((q.shape[0], self._width))
        if self._run(
            self._shape_address,
            self._step_address,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            self._is_bf16,
        ):
            raise MemoryError
        return out
