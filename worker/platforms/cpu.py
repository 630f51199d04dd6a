"""The CPU platform: threads, memory, and linear layers as this machine runs them best."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from worker.attention.base import AttentionSpec
from worker.attention.cpu_native import kernels_for
from worker.cache_size import CPU_KV_SHARE
from worker.layers.linear import (
    Float32Scratch,
    InvariantLinear,
    PackedLinear,
    PlainLinear,
    Scratch,
    StepArithmetic,
    UpcastingLinear,
)
from worker.layers.quantized import (
    W8A16,
    QuantisedWeight,
    W8A8Dynamic,
    W8A8Linear,
    W8A8Static,
    W8A8StaticLinear,
    W8A16Linear,
)
from worker.layers.row_ops import RowOps, TorchRowOps
from worker.native import NativeInt8Linear, NativeLinear, NativeRowOps, kernels
from worker.platforms.base import DTypeName, Linear, Lookup, refuse_fp8
from worker.platforms.cpu_kernels import LinearKernels, probe_linears
from worker.platforms.int8_kernels import Int8Kernels, probe_int8
from worker.platforms.memory_limits import MemoryInfo, read_memory
from worker.platforms.row_sizes import equal_sizes

# what torch and oneDNN say when an allocation fails
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")
_MAX_UPCAST = 128 * 2**20  # weights; a vocabulary head never sees long prefills and would need gigabytes
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuPlatform:
    name = "cpu"
    shares_memory = True
    collectives = "gloo"
    # Products are bound by arithmetic from about 128 rows on. Prompts one after the other take as long as all
    # of them together, and half of their users need not wait for the rest.
    enough_rows = 512

    def __init__(self) -> None:
        self._kernels: dict[torch.dtype, LinearKernels] = {}
        self._int8: Int8Kernels | None = None  # chosen when a model needs them
        self._scratch = Float32Scratch()
        self._int8_scratch: Scratch | None = None
        self._row_sizes: dict[tuple[torch.Size, torch.dtype, bool], tuple[int, ...]] = {}
        self.arithmetic = StepArithmetic()
        compiled = kernels()
        self.row_ops: RowOps = TorchRowOps() if compiled is None else NativeRowOps(compiled)

    @property
    def top_k_top_p(self) -> None:
        """numpy's partition is faster than any filter of torch's here."""
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def set_up(self, device_id: int, num_workers: int, threads: int) -> None:
        """`device_id` is only a slot number here."""
        cores = len(os.sched_getaffinity(0))
        self._threads = threads or max(1, cores // num_workers)
        self.set_up_thread()
        keep_freed_memory()

    def set_up_thread(self) -> None:
        """OpenMP keeps the number of threads for each thread that asks it for others."""
        torch.set_num_threads(self._threads)

    def weight_dtype(self, requested: DTypeName, checkpoint: torch.dtype) -> torch.dtype:
        dtype = checkpoint if requested == "auto" else _DTYPES[requested]
        # float16 products are emulated on most CPUs, and overflow where float32 does not
        return torch.float32 if dtype is torch.float16 else dtype

    def memory(self) -> MemoryInfo:
        return read_memory(Path("/"))

    def is_out_of_memory(self, error: Exception) -> bool:
        """torch has no type of its own for it here; the kernel refuses only at limits of address space."""
        return isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)

    def give_back_memory(self) -> None:
        """Each weight is in memory twice while it is laid out anew: for a vocabulary, hundreds of MiB."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def kv_budget(self, num_workers: int, memory_fraction: float) -> int:
        return int(self.memory().available * CPU_KV_SHARE) // num_workers

    def choose_kernels(self, dtype: torch.dtype) -> None:
        if dtype not in self._kernels:
            self._kernels[dtype] = probe_linears(dtype)

    def attention_backend(self, spec: AttentionSpec) -> str:
        return "cpu_native" if kernels_for(spec) else "cpu_paged"

    def invariant_attention_backend(self, spec: AttentionSpec) -> str:
        return "cpu_native" if kernels_for(spec) else "cpu_invariant"

    def use_fp8(self, dtype: torch.dtype) -> None:
        refuse_fp8(self.name)

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, may_round: bool = False) -> Linear:
        return self._native_linear(weight, bias) or self._torch_linear(weight, bias)

    def pack_tied(self, embedding: Tensor) -> tuple[Linear, Lookup]:
        native = self._native_linear(embedding, None)
        if native is not None:
            return native, native.rows
        # packed, the table is in memory twice, and the step's largest product takes half the time
        return self._torch_linear(embedding, None), lambda ids: functional.embedding(ids, embedding)

    def _native_linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear | None:
        """None: torch's are faster here, or nothing is compiled."""
        self.choose_kernels(weight.dtype)
        arithmetic = self._kernels[weight.dtype].native
        compiled = kernels() if arithmetic else None
        return None if compiled is None else NativeLinear(weight, bias, compiled, dot=arithmetic == "dot")

    def _torch_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        dtype, size = weight.dtype, weight.numel()
        chosen = self._kernels[dtype]
        narrow = PackedLinear(weight, bias) if chosen.packed else PlainLinear(weight, bias)
        fast = UpcastingLinear(narrow, self._scratch) if chosen.upcast and size <= _MAX_UPCAST else narrow
        kind = (weight.shape, dtype, bias is not None)
        if kind not in self._row_sizes:
            self._row_sizes[kind] = equal_sizes(narrow, weight, bias)
        return InvariantLinear(fast, narrow, self._row_sizes[kind], self.arithmetic)

    def choose_int8_kernels(self, dtype: torch.dtype) -> None:
        if self._int8 is None:
            self._int8 = probe_int8(dtype)

    def pack_quantised(self, given: QuantisedWeight, dtype: torch.dtype) -> Linear:
        self.choose_int8_kernels(dtype)
        assert self._int8 is not None
        compiled = kernels() if self._int8.native else None
        if compiled is not None and isinstance(given, W8A8Static | W8A8Dynamic):
            return NativeInt8Linear(given, compiled)
        match given:
            case W8A8Static():
                return W8A8StaticLinear(given, self._int8.product)
            case W8A8Dynamic():
                return W8A8Linear(given, self._int8.product)
            case W8A16():
                return self._pack_w8a16(given, dtype, self._int8.few_rows)

    def _pack_w8a16(self, given: W8A16, dtype: torch.dtype, few_rows: int) -> Linear:
        """Its products are sums of fractions again, so it matters for a row in how many it is."""
        if self._int8_scratch is None or self._int8_scratch.dtype != dtype:
            self._int8_scratch = Scratch(dtype)
        fast = W8A16Linear(given, self._int8_scratch, few_rows)
        narrow = W8A16Linear(given, self._int8_scratch, 0)
        kind = (given.weight.shape, torch.int8, given.bias is not None)
        if kind not in self._row_sizes:
            self._row_sizes[kind] = equal_sizes(narrow, given.dense().to(dtype), given.bias)
        return InvariantLinear(fast, narrow, self._row_sizes[kind], self.arithmetic)

    def step_graphs(self, max_rows: int, max_seq_len: int, block_size: int) -> None:
        """Launching costs next to nothing here."""

    @property
    def independent_rows(self) -> bool:
        return all(chosen.native for chosen in self._kernels.values()) and self._int8_scratch is None

    @property
    def wide_rows(self) -> int | None:
        upcast = any(chosen.upcast and not chosen.native for chosen in self._kernels.values())
        return UpcastingLinear.MIN_ROWS if upcast else None

    def findings(self) -> bytes:
        linears = {str(dtype): astuple(chosen) for dtype, chosen in self._kernels.items()}
        int8 = None if self._int8 is None else astuple(self._int8)
        return json.dumps({"linears": linears, "int8": int8}).encode()

    def adopt(self, findings: bytes) -> None:
        chosen = json.loads(findings)
        dtypes = {str(dtype): dtype for dtype in _DTYPES.values()}
        self._kernels = {dtypes[name]: LinearKernels(*fields) for name, fields in chosen["linears"].items()}
        self._int8 = None if chosen["int8"] is None else Int8Kernels(*chosen["int8"])

    def describe(self) -> str:
        told = [f"{str(dtype)[6:]} linears {chosen}" for dtype, chosen in self._kernels.items()]
        if self._int8 is not None:
            told.append(f"int8 linears {self._int8}")
        return f"cpu, {torch.get_num_threads()} threads, {'; '.join(told) or 'no linears yet'}"


def keep_freed_memory() -> None:
    """Make glibc reuse large buffers: 8 prompts of 256 tokens took 233,000 page faults, 18 % of their time.

    Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC_PARAMETERS:
            mallopt(parameter, value)


# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
_MALLOC_PARAMETERS = ((-3, 2**30), (-1, 2**30), (-2, 64 * 2**20))
