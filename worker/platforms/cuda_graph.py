"""Decode steps as CUDA graphs: the kernels read lengths on the device, so a replay is a copy and a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.attention.base import AttentionBackend
from worker.attention.triton_paged import TritonAttention
from worker.batch import Batch
from worker.platforms.decode_graphs import DecodeGraphs, StaticStep


class CudaDecodeGraphs(DecodeGraphs):
    stride: ClassVar[int] = 8

    def __init__(self, runtime: Any, max_rows: int, max_seq_len: int, block_size: int) -> None:
        super().__init__(runtime, max_rows, max_seq_len, block_size)
        largest = StaticStep.numbers(self._sizes[-1], self._width)
        self._staging = pinned(largest)
        self._copied = runtime.Event()

    def _begin(self, attention: AttentionBackend, batch: Batch, step: StaticStep) -> None:
        assert isinstance(attention, TritonAttention)
        attention.begin(batch, step.table, step.lengths, self._block_size)

    def _record(self, compute: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
        graph = self._runtime.CUDAGraph()
        # threads of the collectives' library may ask for events meanwhile
        with self._runtime.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = compute()
        return graph, logits

    def _replay(self, graph: Any, step: StaticStep, packed: NDArray[np.int32]) -> None:
        self._copied.synchronize()  # a rank that samples nothing may be a step ahead of its device
        staged = self._staging[: len(packed)]
        staged.numpy()[:] = packed
        step.packed.copy_(staged, non_blocking=True)
        self._copied.record()
        graph.replay()


def pinned(numbers: int) -> Tensor:
    """int32 [numbers] on the host; from elsewhere a copy would wait for the device."""
    return torch.zeros(numbers, dtype=torch.int32, pin_memory=True)
