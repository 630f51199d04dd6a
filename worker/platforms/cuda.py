"""The NVIDIA GPU: its device, its memory, and layers out of cuBLAS and our own Triton kernels.

Checked on the CPU alone, not run on hardware: docs/cuda.md says what that means.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.attention.base import AttentionSpec
from worker.attention.triton_paged import refusal
from worker.device_draw import TopKTopP
from worker.layers.quantized import QuantisedWeight
from worker.platforms.accelerator import DTYPES, Accelerator
from worker.platforms.base import DTypeName, Linear, StepGraphs
from worker.platforms.cuda_draw import keep_top_k_top_p
from worker.platforms.cuda_graph import CudaDecodeGraphs
from worker.platforms.cuda_linears import fp8_linear, quantised_linear
from worker.platforms.cuda_row_ops import CudaRowOps
from worker.platforms.cuda_start import FP8, NVIDIA, dotted, find_gpu

log = logging.getLogger("llm.platform")

GRAPHS = "MINDIE_CUDA_GRAPHS"  # "0": none, to find out whether they are at fault


class CudaPlatform(Accelerator):
    name = "cuda"
    collectives = "nccl"

    def __init__(self) -> None:
        super().__init__(CudaRowOps())
        self._fp8 = False

    @property
    def top_k_top_p(self) -> TopKTopP:
        return keep_top_k_top_p

    def set_up(self, device_id: int, num_workers: int, threads: int) -> None:
        """Claim device `device_id` of those visible, and hide the others from this process.

        StartupError: the driver is missing, silent or too old for torch, or there is no such device.
        """
        self._threads = threads
        self._chip, self._capability = find_gpu(device_id)
        NVIDIA.show_only(device_id)
        # freed memory of one size serves another: without it caches of many shapes are lost to fragments
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # the other name of it, which would lose
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self._runtime = torch.cuda
        try:
            self.set_up_thread()
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
            first = str(error).splitlines()[0]
            raise StartupError(
                f"deviceType 'cuda': torch cannot use {self._chip}: {first}", EXIT_INIT
            ) from None
        self._device = torch.device("cuda", 0)

    def weight_dtype(self, requested: DTypeName, checkpoint: torch.dtype) -> torch.dtype:
        return checkpoint if requested == "auto" else DTYPES[requested]

    def attention_backend(self, spec: AttentionSpec) -> str:
        if (why := refusal(spec)) is not None:
            raise StartupError(why, EXIT_INIT)
        return "triton"

    def invariant_attention_backend(self, spec: AttentionSpec) -> str:
        """The only one; what a row's bits depend on is up to the products of cuBLAS as well."""
        return self.attention_backend(spec)

    def use_fp8(self, dtype: torch.dtype) -> None:
        if self._capability < FP8:
            raise StartupError(
                f"linearDtype 'fp8': {self._chip} has compute capability {dotted(self._capability)};"
                f" fp8 takes {dotted(FP8)} (Ada, Hopper) or newer; set it to 'auto'",
                EXIT_INIT,
            )
        if dtype is torch.float32:
            raise StartupError(
                "linearDtype 'fp8': it is made of weights in 16 bits, not float32; set dtype to 'bfloat16'",
                EXIT_INIT,
            )
        self._fp8 = True

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, may_round: bool = False) -> Linear:
        if self._fp8 and may_round:
            return fp8_linear(weight, bias, self._device)
        return super().pack_linear(weight, bias)

    def pack_quantised(self, given: QuantisedWeight, dtype: torch.dtype) -> Linear:
        return quantised_linear(given, dtype, self._device)

    def step_graphs(self, max_rows: int, max_seq_len: int, block_size: int) -> StepGraphs | None:
        if os.environ.get(GRAPHS) == "0":
            log.warning("%s=0: decode steps run without graphs", GRAPHS)
            return None
        return CudaDecodeGraphs(self._runtime, max_rows, max_seq_len, block_size)

    def describe(self) -> str:
        layers = ", layers in fp8" if self._fp8 else ""
        return f"{self._device}, {self._chip} ({dotted(self._capability)}), Triton kernels{layers}"
