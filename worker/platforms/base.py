"""What the worker asks of a device. Nothing outside this folder knows which one it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NoReturn, Protocol

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.plan import StepPlan
from worker.attention.base import AttentionBackend, AttentionSpec
from worker.batch import Batch
from worker.device_draw import TopKTopP
from worker.layers.linear import StepArithmetic
from worker.layers.quantized import QuantisedWeight
from worker.layers.row_ops import RowOps
from worker.platforms.memory_limits import MemoryInfo

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Linear = Callable[[Tensor], Tensor]  # [rows, in] -> [rows, out]
Lookup = Callable[[Tensor], Tensor]  # int [T] -> [T, hidden]


class StepGraphs(Protocol):
    """Steps of a model recorded beforehand: `capture` once, then `forward` where it `serves`."""

    spare_blocks: int  # behind the blocks of the cache, for rows that are nobody's

    def capture(
        self,
        compute: Callable[[Batch], Tensor],
        attention: AttentionBackend,
        device: torch.device,
        spare_from: int,
    ) -> None:
        """`compute`: a batch -> logits of its rows, by `attention`. Writes into the spare blocks."""

    def serves(self, plan: StepPlan) -> bool:
        """Whether the step has been recorded."""

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits of each row, [R, vocab], in the plan's order; valid until the next step."""


class Platform(Protocol):
    name: str
    shares_memory: bool  # whether all workers of the machine take from one memory, which is the host's
    collectives: str  # the backend of torch.distributed that joins several of these devices
    row_ops: RowOps
    arithmetic: StepArithmetic  # of all layers this platform packs
    enough_rows: int  # with more in a product none of them is computed sooner

    @property
    def top_k_top_p(self) -> TopKTopP | None:
        """A fused filter of logits; None: rows are better copied to the host and filtered there."""

    @property
    def device(self) -> torch.device: ...

    def set_up(self, device_id: int, num_workers: int, threads: int) -> None:
        """Claim this worker's share of the machine; once, before any tensor is made. threads 0: all of it."""

    def set_up_thread(self) -> None:
        """Let the calling thread compute as the one does that has called `set_up`."""

    def weight_dtype(self, requested: DTypeName, checkpoint: torch.dtype) -> torch.dtype:
        """The dtype to compute in; may be wider than requested where the device lacks it."""

    def memory(self) -> MemoryInfo: ...

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether the error says that memory could not be had, and nothing else is wrong."""

    def give_back_memory(self) -> None:
        """Return to the system what has been freed and kept for reuse."""

    def kv_budget(self, num_workers: int, memory_fraction: float) -> int:
        """Bytes one worker may spend on its KV cache when nobody said how many; falls as memory is taken.

        `memory_fraction`: of a device's own memory, what weights, cache and steps may take in all.
        """

    def choose_kernels(self, dtype: torch.dtype) -> None:
        """Find out by measuring what computes best in `dtype`, before the first layer of it is packed."""

    def attention_backend(self, spec: AttentionSpec) -> str:
        """The row of worker/attention/registry.py that serves these shapes."""

    def invariant_attention_backend(self, spec: AttentionSpec) -> str:
        """The same for steps that must not depend on batch mates."""

    def use_fp8(self, dtype: torch.dtype) -> None:
        """Round what is packed from now on to fp8 where it may be; StartupError where that cannot be."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, may_round: bool = False) -> Linear:
        """weight: [out, in]; bias: [out]. Both may be kept: the caller must not change them any more.

        `may_round`: it is one of those that `use_fp8` speaks of.
        """

    def pack_tied(self, embedding: Tensor) -> tuple[Linear, Lookup]:
        """embedding: [vocab, hidden], kept as in `pack_linear` -> the head that it is too, and its rows."""

    def choose_int8_kernels(self, dtype: torch.dtype) -> None:
        """As `choose_kernels`, for layers of int8 weights, whose other operands are in `dtype`."""

    def pack_quantised(self, given: QuantisedWeight, dtype: torch.dtype) -> Linear:
        """As `pack_linear`; the layer takes and gives `dtype`."""

    def step_graphs(self, max_rows: int, max_seq_len: int, block_size: int) -> StepGraphs | None:
        """For decode steps of up to so many rows; None: the device gains nothing by them."""

    @property
    def independent_rows(self) -> bool:
        """Whether the linear layers made so far give a row the same bits in any batch, asked or not."""

    @property
    def wide_rows(self) -> int | None:
        """Rows from which the linear layers made so far compute in another arithmetic; None: never."""

    def findings(self) -> bytes:
        """What was chosen by measuring, for `adopt` of another process on the same machine."""

    def adopt(self, findings: bytes) -> None:
        """Choose as another process has; before any layer is packed."""

    def describe(self) -> str:
        """One line for the log: what the start-up probe chose."""


def refuse_fp8(device_type: str) -> NoReturn:
    raise StartupError(
        f"linearDtype 'fp8': deviceType {device_type!r} does not compute in it; set it to 'auto'",
        EXIT_INIT,
    )
