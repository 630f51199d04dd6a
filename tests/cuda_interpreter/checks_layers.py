"""Row operators and layers of few bits against those of torch."""

from __future__ import annotations

import pytest
import torch

import tests.cuda_interpreter.interpreter  # noqa: F401
from worker.hf_config import RopeConfig
from worker.layers.int8_product import int8_product_in_float32
from worker.layers.linear import PlainLinear, Scratch
from worker.layers.quantized import (
    W8A16,
    W8A8Dynamic,
    W8A8Linear,
    W8A8Static,
    W8A8StaticLinear,
    W8A16Linear,
    quantise_rows,
)
from worker.layers.rotary import RotaryTable
from worker.layers.row_ops import TorchRowOps
from worker.platforms.cuda_linears import fp8_linear, quantised_linear
from worker.platforms.cuda_row_ops import CudaRowOps

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one rounding more or less
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

OURS, TORCH = CudaRowOps(), TorchRowOps()


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 129])
def test_norms(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, delta = (torch.randn(5, width).to(dtype) for _ in range(2))
    weight = torch.randn(width).to(dtype)
    assert_close(OURS.add_rms_norm(x, None, weight, 1e-5), TORCH.add_rms_norm(x, None, weight, 1e-5))
    mine, theirs = x.clone(), x.clone()
    got, wanted = (
        ops.add_rms_norm(sums, delta, weight, 1e-5) for ops, sums in ((OURS, mine), (TORCH, theirs))
    )
    assert torch.equal(mine, theirs)
    assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore:overflow")  # of numpy's exp, whose infinity is what the kernel wants
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 1024, 1500])
def test_the_gated_activation(width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * width).to(dtype) * 4
    gate_up[0, :2] = torch.tensor([-90.0, 90.0])
    assert_close(OURS.silu_mul(gate_up), TORCH.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [10, 64, 80])
def test_rotations(head_dim: int, dtype: torch.dtype) -> None:
    """Three query heads, two of keys; those of values behind them stay as they are."""
    table = RotaryTable(RopeConfig(kind="default", theta=10000.0), head_dim, 50, dtype, CPU)
    cos, sin = table.gather(torch.tensor([0, 7, 49, 7]))
    heads = torch.randn(4, 7, head_dim).to(dtype)
    mine = heads.clone()
    for got, wanted in zip(
        OURS.rotate_apart(mine, 3, 2, cos, sin), TORCH.rotate_apart(heads, 3, 2, cos, sin), strict=True
    ):
        assert_close(got, wanted)
    assert torch.equal(mine[:, 5:], heads[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48, 32), (20, 70, 130)])  # rows, inputs, outputs
@pytest.mark.parametrize("bias", [False, True])
def test_activations_quantised_by_rows(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    rows, inputs, outputs = shape
    weight, scale = quantise_rows(torch.randn(outputs, inputs))
    given = W8A8Dynamic(weight, scale, torch.randn(outputs) if bias else None)
    x = torch.randn(rows, inputs).to(dtype)
    x[0] = 0
    assert_close(quantised_linear(given, dtype, CPU)(x), W8A8Linear(given, int8_product_in_float32)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48, 32), (20, 70, 130)])
def test_activations_quantised_by_constants(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, outputs = shape
    weight, scale = quantise_rows(torch.randn(outputs, inputs))
    sums = torch.randint(-1000, 1000, (outputs,), dtype=torch.int32)
    given = W8A8Static(weight, 0.02, -3.0, sums, scale * 0.02)
    x = torch.randn(rows, inputs).to(dtype)
    x[0, :2] = torch.tensor([50.0, -50.0])  # beyond what the constants allow for
    assert_close(quantised_linear(given, dtype, CPU)(x), W8A8StaticLinear(given, int8_product_in_float32)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48, 32), (20, 70, 130)])
@pytest.mark.parametrize("offset", [False, True])
def test_weights_of_8_bits(shape: tuple[int, int, int], dtype: torch.dtype, offset: bool) -> None:
    rows, inputs, outputs = shape
    weight, scale = quantise_rows(torch.randn(outputs, inputs) / inputs**0.5)
    zero_points = torch.randint(-100, 100, (outputs,)).float() if offset else None
    given = W8A16(weight, scale, zero_points, torch.randn(outputs))
    x = torch.randn(rows, inputs).to(dtype)
    wanted = W8A16Linear(given, Scratch(torch.float32), few_rows=0)(x.float())
    assert_close(quantised_linear(given, dtype, CPU)(x), wanted.to(dtype))


@pytest.mark.parametrize("rows", [1, 20])
def test_fp8(rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    x = torch.randn(rows, 64).bfloat16()
    got = fp8_linear(weight, bias, CPU)(x)
    wanted = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    # three bits behind the first of each factor
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_weight_that_fp8_cannot_take_stays_as_it_is() -> None:
    assert isinstance(fp8_linear(torch.randn(48, 40).bfloat16(), None, CPU), PlainLinear)
