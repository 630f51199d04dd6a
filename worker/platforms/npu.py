"""The Ascend NPU: its device, its memory, and layers made of the operators of torch_npu.

The only module that imports torch_npu, and only once a device has answered. Verified on a stand-in for the
runtime, not on hardware: docs/npu.md says what that means.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.attention.base import AttentionSpec
from worker.attention.npu import refusal
from worker.device_draw import TopKTopP
from worker.layers.quantized import QuantisedWeight
from worker.platforms.accelerator import DTYPES, Accelerator
from worker.platforms.base import DTypeName, Linear, StepGraphs
from worker.platforms.npu_chips import SERVED, generation_of
from worker.platforms.npu_graph import NpuDecodeGraphs
from worker.platforms.npu_linears import quantised_linear
from worker.platforms.npu_row_ops import NpuRowOps
from worker.platforms.npu_start import ASCEND

log = logging.getLogger("llm.platform")

GRAPHS = "MINDIE_NPU_GRAPHS"  # "0": none, to find out whether they are at fault


class NpuPlatform(Accelerator):
    name = "npu"
    collectives = "hccl"

    def __init__(self) -> None:
        super().__init__(NpuRowOps())

    @property
    def top_k_top_p(self) -> TopKTopP:
        return keep_top_k_top_p

    def set_up(self, device_id: int, num_workers: int, threads: int) -> None:
        """Claim device `device_id` of those visible, and hide the others from this process.

        StartupError: torch_npu or CANN is missing, the driver is silent, or there is no such device.
        """
        self._threads = threads
        self._chip = ASCEND.check(ASCEND.ask(device_id), device_id)
        generation = generation_of(self._chip)
        if generation is None:
            log.warning("chip %r is none that is known; it is treated as %s", self._chip, SERVED)
        elif not generation.serves:
            raise StartupError(
                f"deviceType 'npu': {self._chip} ({generation.name}) has no paged attention; {SERVED} has",
                EXIT_INIT,
            )
        ASCEND.show_only(device_id)
        # freed memory of one size serves another: without it caches of many shapes are lost to fragments
        os.environ.setdefault("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
        self._runtime = load_torch_npu()
        self.set_up_thread()
        self._runtime.config.allow_internal_format = True  # weights in tiles
        self._device = torch.device("npu", 0)

    def weight_dtype(self, requested: DTypeName, checkpoint: torch.dtype) -> torch.dtype:
        """Attention computes in 16 bits: float32 becomes bfloat16, which has its range."""
        dtype = checkpoint if requested == "auto" else DTYPES[requested]
        if dtype is not torch.float32:
            return dtype
        if requested == "float32":
            raise StartupError(
                "dtype 'float32': attention on an NPU computes in 16 bits; 'bfloat16', 'float16' or 'auto'",
                EXIT_INIT,
            )
        return torch.bfloat16

    def attention_backend(self, spec: AttentionSpec) -> str:
        if (why := refusal(spec)) is not None:
            raise StartupError(why, EXIT_INIT)
        return "npu"

    def invariant_attention_backend(self, spec: AttentionSpec) -> str:
        """The only one: what a row's bits depend on is up to the operators."""
        return self.attention_backend(spec)

    def pack_quantised(self, given: QuantisedWeight, dtype: torch.dtype) -> Linear:
        return quantised_linear(given, dtype, self._device)

    def step_graphs(self, max_rows: int, max_seq_len: int, block_size: int) -> StepGraphs | None:
        if os.environ.get(GRAPHS) == "0":
            log.warning("%s=0: decode steps run without graphs", GRAPHS)
            return None
        return NpuDecodeGraphs(self._runtime, max_rows, max_seq_len, block_size)

    def describe(self) -> str:
        return f"{self._device}, {self._chip}, torch_npu operators"


def keep_top_k_top_p(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """See `TopKTopP`."""
    kept: Tensor = torch.ops.npu.npu_top_k_top_p(logits, p=top_p, k=top_k)
    return kept


def load_torch_npu() -> Any:
    """`torch.npu`; StartupError when torch_npu cannot be loaded after all."""
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        first = str(error).splitlines()[0]
        raise StartupError(f"deviceType 'npu': torch_npu cannot be loaded: {first}", EXIT_INIT) from None
    return torch.npu  # type: ignore[attr-defined]
