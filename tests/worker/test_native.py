"""The compiled kernels against their twins out of torch, for every instruction set that this machine has."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from worker.layers.int8_product import int8_product
from worker.layers.quantized import W8A8Dynamic, W8A8Linear, W8A8Static, W8A8StaticLinear
from worker.layers.row_ops import TorchRowOps
from worker.native import NativeInt8Linear, NativeLinear, NativeRowOps
from worker.native.build import library_path
from worker.native.library import Kernels, all_kernels

SHAPES = ((32, 4), (33, 5), (70, 130), (1, 1), (100, 1217))  # outputs, inputs
ROWS = (1, 2, 3, 12, 13, 25, 40)
MANY = {1217: (65, 530)}  # inputs: more rows, which a matrix unit takes in blocks, and long inputs in parts
BUILD = Path(__file__).resolve().parents[2] / "worker" / "native" / "build.py"
HAS_COMPILER = any(map(shutil.which, ("g++", "c++")))


@pytest.fixture(params=range(5))
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = all_kernels()
    if request.param >= len(found):
        pytest.skip("this machine has no such instruction set" if found else "no compiled kernels")
    return found[request.param]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_set_up_has_built_them_here() -> None:
    assert library_path().is_file(), "scripts/test.sh does it"
    assert all_kernels()[-1].name == b"plain"


def test_a_build_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    """From a copy whose sources are others, so that it has to build; `false` is no compiler."""
    folder = tmp_path / "native"
    shutil.copytree(BUILD.parent, folder)
    (folder / "kernels.h").write_text("another one")
    done = subprocess.run(
        [sys.executable, str(folder / "build.py")],
        env={**os.environ, "CXX": "false"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("no compiled kernels, torch alone will compute")


def test_without_them_one_line_warns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.native.library.library_path", lambda: tmp_path / "none.so")
    all_kernels.cache_clear()
    try:
        assert all_kernels() == all_kernels() == ()
    finally:
        all_kernels.cache_clear()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "no compiled kernels" in record.getMessage()


# bfloat16 results of order 10 differ by a rounding, float32 sums of 1000 products of order 1 in the last bits
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-3}, torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2}}


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linears_equal_torch_and_a_row_does_not_depend_on_the_others(
    kernels: Kernels, threads: int, dtype: torch.dtype, dot: bool
) -> None:
    torch.manual_seed(0)
    for outputs, inputs in (*SHAPES, (1100, 640)):  # the last is spread over threads even with one row
        weight = torch.randn(outputs, inputs).to(dtype)
        for bias in (torch.randn(outputs).to(dtype), None):
            linear = NativeLinear(weight, bias, kernels, dot)
            numbers = (*ROWS, *MANY.get(inputs, ()))
            x = torch.randn(numbers[-1], inputs + 3).to(dtype)[:, 1 : inputs + 1]  # rows that lie apart
            want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            got = linear(x)
            torch.testing.assert_close(got, want.to(dtype), **TOLERANCE[dtype])
            for rows in numbers:
                assert torch.equal(linear(x[:rows]), got[:rows]), (outputs, inputs, rows)
            assert torch.equal(linear(x.t().contiguous().t()), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_whole_and_by_row(kernels: Kernels, dtype: torch.dtype) -> None:
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs).to(dtype)
        linear = NativeLinear(weight, None, kernels)
        chosen = torch.randint(0, outputs, (9,), dtype=torch.int32)
        assert torch.equal(linear.dense(), weight)
        assert torch.equal(linear.rows(chosen), weight[chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_equals_its_twins_to_the_bit(kernels: Kernels, threads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for outputs, inputs in (*SHAPES, (500, 300)):
        weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        scale, bias = torch.rand(outputs) * 0.01, torch.randn(outputs)
        whole = torch.randint(-3000, 3000, (outputs,), dtype=torch.int32)
        given: list[W8A8Dynamic | W8A8Static] = [
            W8A8Dynamic(weight, scale, None),
            W8A8Dynamic(weight, scale, bias),
            W8A8Static(weight, 0.02, -7.0, whole, scale),
        ]
        for parts in given:
            native = NativeInt8Linear(parts, kernels)
            twin = (
                W8A8Linear(parts, int8_product)
                if isinstance(parts, W8A8Dynamic)
                else W8A8StaticLinear(parts, int8_product)
            )
            assert torch.equal(native.dense(), weight)
            for rows in (*ROWS, *MANY.get(inputs, ())):
                x = (torch.randn(rows, inputs + 2) * 3).to(dtype)[:, :inputs]
                x[rows // 2] = 0
                assert torch.equal(native(x), twin(x)), (outputs, inputs, rows, type(parts))


def test_an_int8_row_without_a_scale_is_nan_and_harms_no_other(kernels: Kernels) -> None:
    native = NativeInt8Linear(
        W8A8Dynamic(torch.ones(40, 24, dtype=torch.int8), torch.ones(40), None), kernels
    )
    x = torch.ones(4, 24)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    y = native(x)
    assert y[1:3].isnan().all()
    assert torch.equal(y[[0, 3]], native(torch.ones(2, 24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_ops_equal_torch_and_a_row_does_not_depend_on_the_others(
    kernels: Kernels, threads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    native, twin = NativeRowOps(kernels), TorchRowOps()
    # the twin rounds in between: two roundings of bfloat16 numbers of order 10
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for width, rows in ((96, 3), (1, 2), (37, 5), (1216, 40)):
        x, delta, weight = torch.randn(2 * rows + 1, width).to(dtype).split([rows, rows, 1])
        mine, its = x.clone(), x.clone()
        got = native.add_rms_norm(mine, delta, weight[0], 1e-6)
        torch.testing.assert_close(got, twin.add_rms_norm(its, delta, weight[0], 1e-6), **close)
        assert torch.equal(mine, its)
        assert torch.equal(native.add_rms_norm(mine, None, weight[0], 1e-6), got) and torch.equal(mine, its)
        last = x[-1:].clone()
        assert torch.equal(native.add_rms_norm(last, delta[-1:], weight[0], 1e-6), got[-1:])

        gate_up = (torch.randn(rows, 2 * width) * 30).to(dtype)
        gate_up[0, 0], gate_up[-1, -1] = -200, torch.nan
        got = native.silu_mul(gate_up)
        torch.testing.assert_close(got, twin.silu_mul(gate_up), **close, equal_nan=True)
        assert torch.equal(native.silu_mul(gate_up[:1]), got[:1])

    for dim, tokens in ((16, 3), (64, 40), (6, 2), (80, 5)):
        heads = torch.randn(tokens, 5, dim).to(dtype)
        angle = torch.randn(tokens, 1, dim // 2)
        cos, sin = angle.cos().repeat(1, 1, 2).to(dtype), angle.sin().to(dtype)
        sin = torch.cat((-sin, sin), dim=-1)
        mine = heads.clone()
        got = native.rotate(mine, 3, cos, sin)
        torch.testing.assert_close(got, twin.rotate(heads, 3, cos, sin), **close)
        assert torch.equal(mine[:, 3:], heads[:, 3:])
        alone = native.rotate(heads[-1:].clone(), 3, cos[-1:], sin[-1:])
        assert torch.equal(alone, got[-1:])
