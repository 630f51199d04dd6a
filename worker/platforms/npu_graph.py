"""Decode steps as graphs of an NPU.

Lengths are arguments of its attention on the host, so a replay hands them in anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.attention.base import AttentionBackend
from worker.attention.npu import NpuAttention
from worker.batch import Batch
from worker.platforms.decode_graphs import DecodeGraphs, StaticStep


class NpuDecodeGraphs(DecodeGraphs):
    stride: ClassVar[int] = 16  # each graph takes streams of the device, of which there are few

    def _begin(self, attention: AttentionBackend, batch: Batch, step: StaticStep) -> None:
        assert isinstance(attention, NpuAttention)
        attention.begin(batch, step.table, self._block_size)

    def _record(self, compute: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor]:
        npu = self._runtime
        graph = npu.NPUGraph()
        with npu.graph(graph, pool=pool, capture_error_mode="thread_local", auto_dispatch_capture=True):
            logits = compute()
        return graph, logits

    def _replay(self, graph: Any, step: StaticStep, packed: NDArray[np.int32]) -> None:
        step.packed.copy_(torch.from_numpy(packed), non_blocking=True)
        # the attention within the graph waits for the lengths that come after
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": step.lengths_in(packed).tolist()}])
