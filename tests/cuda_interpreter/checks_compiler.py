"""Triton's compiler, for chips that are not here: it takes each kernel, within the shared memory of the chip.

The kernels are asked for through the code that launches them, with a launch that compiles instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention import triton_kernels
from worker.attention.base import AttentionSpec
from worker.attention.triton_paged import TritonAttention
from worker.batch import make_batch
from worker.kv_pages import Int8Pages, KvPages
from worker.layers.quantized import W8A16, W8A8Dynamic, W8A8Static
from worker.platforms import cuda_kernels
from worker.platforms.cuda_linears import fp8_linear, quantised_linear
from worker.platforms.cuda_row_ops import CudaRowOps

CPU = torch.device("cpu")
# compute capability -> bytes of shared memory that a program may have
CHIPS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Compiled:
    """Stands where a kernel stands."""

    def __init__(self, kernel: Any, chip: int, done: list[str]) -> None:
        self._kernel = kernel
        self._chip = chip
        self._done = done

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size <= 65535 for size in grid[1:])
        return self._launch

    def _launch(self, *arguments: Any, num_warps: int = 4, num_stages: int = 3) -> None:
        signature, constants, attributes = {}, {}, {}
        for place, (parameter, value) in enumerate(zip(self._kernel.params, arguments, strict=True)):
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (not parameter.do_not_specialize and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", self._chip, 32), options=options)
        assert "cubin" in made.asm
        assert made.metadata.shared <= CHIPS[self._chip], (self._kernel.__name__, made.metadata.shared)
        self._done.append(self._kernel.__name__)


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Has every kernel compiled for a chip -> the names of those that have been."""

    def begin(chip: int) -> list[str]:
        done: list[str] = []
        for module in (triton_kernels, cuda_kernels):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Compiled(getattr(module, name), chip, done))
        return done

    return begin


CompileFor = Callable[[int], list[str]]


@pytest.mark.parametrize(
    ("chip", "head_dim", "dtype", "int8"),
    [(80, 64, torch.float16, False), (89, 128, torch.bfloat16, True), (89, 256, torch.bfloat16, False),
     (89, 128, torch.float32, False), (90, 128, torch.bfloat16, False)],
)  # fmt: skip
def test_attention(compile_for: CompileFor, chip: int, head_dim: int, dtype: torch.dtype, int8: bool) -> None:
    compiled = compile_for(chip)
    spec = AttentionSpec(num_heads=14, num_kv_heads=2, head_dim=head_dim, dtype=dtype, int8_cache=int8)
    sequences = [Sequence(0, [0] * length, SamplingParams(max_tokens=1)) for length in (1, 40)]
    for sequence, blocks in zip(sequences, ([0], [1, 2, 3]), strict=True):
        sequence.block_table = blocks
    batch = make_batch(build_plan(StepKind.PREFILL, sequences, 16), CPU)
    q, k, v = (torch.zeros(41, heads, head_dim, dtype=dtype) for heads in (14, 2, 2))
    pages: KvPages = torch.zeros(4, 16, 2, head_dim, dtype=dtype)
    if int8:
        pages = Int8Pages(torch.zeros(4, 16, 2, head_dim, dtype=torch.int8), torch.zeros(4, 16, 2))
    attention = TritonAttention(spec)
    table, lengths = torch.from_numpy(batch.block_table), torch.from_numpy(batch.context_len)
    attention.begin(batch, table, lengths, 16, splits=8)
    attention.forward(q, k, v, pages, pages)
    attention.rotate_and_forward(torch.cat((q, k), dim=1), v, q[:, :1], q[:, :1], pages, pages)
    assert compiled == ["store_kernel", *["attend_kernel", "merge_kernel"] * 2] * 2


@pytest.mark.parametrize("chip", CHIPS)
def test_row_operators(compile_for: CompileFor, chip: int) -> None:
    compiled = compile_for(chip)
    ops = CudaRowOps()
    for dtype in (torch.bfloat16, torch.float32):
        x, cos = torch.zeros(3, 1536, dtype=dtype), torch.zeros(3, 1, 128, dtype=dtype)
        ops.add_rms_norm(x, x.clone(), x[0], 1e-5)
        ops.add_rms_norm(x, None, x[0], 1e-5)
        ops.silu_mul(x)
        ops.rotate(x.view(3, 12, 128), 9, cos, cos)
    assert len(compiled) == 8


@pytest.mark.parametrize(("chip", "rows"), [(80, 1), (89, 100), (90, 100)])
def test_products(compile_for: CompileFor, chip: int, rows: int) -> None:
    compiled = compile_for(chip)
    weight, scale = torch.zeros(96, 64, dtype=torch.int8), torch.zeros(96)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(rows, 64, dtype=dtype)
        for given in (
            W8A8Static(weight, 0.1, 0.0, scale.int(), scale),
            W8A8Dynamic(weight, scale, scale),
            W8A16(weight, scale, scale, None),
        ):
            quantised_linear(given, dtype, CPU)(x)
    assert len(compiled) == 10


@pytest.mark.parametrize("chip", [89, 90])
def test_fp8(compile_for: CompileFor, chip: int) -> None:
    compiled = compile_for(chip)
    fp8_linear(torch.ones(32, 32).bfloat16(), None, CPU)(torch.ones(4, 32).bfloat16())
    assert compiled == ["quantise_rows_kernel"]
