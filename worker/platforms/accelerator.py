"""What accelerators with a memory of their own share; `torch.cuda` and `torch.npu` are alike in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.layers.linear import PlainLinear, StepArithmetic
from worker.layers.row_ops import RowOps
from worker.platforms.base import Linear, Lookup, refuse_fp8
from worker.platforms.memory_limits import MemoryInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Accelerator:
    """A platform but for its start, its operators and what it refuses."""

    name: str
    shares_memory = False
    # a prompt of some thousand tokens keeps the matrix units busy, and more of them wait for nothing
    enough_rows = 8192

    def __init__(self, row_ops: RowOps) -> None:
        self.row_ops = row_ops
        self.arithmetic = StepArithmetic()
        self._device = torch.device("cpu")  # until there is another
        self._threads = 0
        self._runtime: Any = None  # torch.cuda or torch.npu, of the one device that is seen

    @property
    def device(self) -> torch.device:
        return self._device

    def set_up_thread(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        self._runtime.set_device(0)  # of the one that is left

    def memory(self) -> MemoryInfo:
        free, total = self._runtime.mem_get_info()
        # what the allocator keeps for reuse is free to us
        kept = self._runtime.memory_reserved() - self._runtime.memory_allocated()
        return MemoryInfo(free + kept, total)

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError | torch.OutOfMemoryError)

    def give_back_memory(self) -> None:
        self._runtime.empty_cache()

    def kv_budget(self, num_workers: int, memory_fraction: float) -> int:
        """The share of the device's memory that is ours, without what is taken."""
        memory = self.memory()
        return max(0, memory.available - int(memory.total * (1 - memory_fraction)))

    def choose_kernels(self, dtype: torch.dtype) -> None:
        """There is one kernel of each kind, and it is the device's."""

    def choose_int8_kernels(self, dtype: torch.dtype) -> None:
        """As `choose_kernels`."""

    def use_fp8(self, dtype: torch.dtype) -> None:
        refuse_fp8(self.name)

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, may_round: bool = False) -> Linear:
        return PlainLinear(weight.to(self._device), None if bias is None else bias.to(self._device))

    def pack_tied(self, embedding: Tensor) -> tuple[Linear, Lookup]:
        there = embedding.to(self._device)
        return PlainLinear(there, None), lambda ids: functional.embedding(ids, there)

    @property
    def independent_rows(self) -> bool:
        return False

    @property
    def wide_rows(self) -> int | None:
        return None

    def findings(self) -> bytes:
        return b"{}"

    def adopt(self, findings: bytes) -> None:
        """Nothing is measured here."""
