"""Layers of int8 weights against their formulas in float64, and whole models against what they stand for."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from engine.errors import StartupError
from engine.plan import StepKind
from scripts import quantize
from scripts.write_random_model import Shape, write_model
from tests.worker.conftest import MODEL, Harness, write_checkpoint
from worker.layers.int8_product import int8_product, int8_product_in_float32
from worker.layers.linear import InvariantLinear
from worker.layers.quantized import (
    W8A16,
    SideBySide,
    W8A8Dynamic,
    W8A8Linear,
    W8A8Static,
    W8A8StaticLinear,
    quantise_rows,
)
from worker.loader import Checkpoint
from worker.platforms import int8_kernels
from worker.platforms.cpu import CpuPlatform
from worker.platforms.int8_kernels import Int8Kernels, probe_int8

SHAPE = Shape("qwen2", layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, vocab=600, tied=True)
SCHEMES = ("w8a8_dynamic", "w8a8", "w8a16")
TEXT = " badebi dafudi gika"


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 3000), st.integers(0, 2**31))
def test_products_of_int8_are_exact(rows: int, outs: int, ins: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, weight = int8(rows, ins), int8(outs, ins)
    q[0] = weight[0] = -128  # the largest sum there is
    want = q.long() @ weight.long().t()
    for product in (int8_product, int8_product_in_float32):
        got = product(q, weight)
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), want)


def test_rows_are_quantised_by_their_own_largest_number() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 5e-4, 0.0]])
    q, scale = quantise_rows(x)
    assert q.tolist() == [[64, -127, 32], [0, 0, 0], [127, 64, 0]]
    torch.testing.assert_close(q * scale[:, None], x, rtol=0, atol=2 / 254)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_follow_their_formulas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 48).clamp(-2.9, 2.9).to(dtype)
    x[:, 0], x[x.abs() == 1.5] = 3.0, 1.25  # nothing lies half way between two steps
    weight, scale, bias = int8(20, 48), torch.rand(20) / 50 + 0.01, torch.randn(20)
    exact = x.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-2}

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)

    row_scale = exact.abs().amax(1, keepdim=True) / 127
    by_row = (exact / row_scale).round() @ weight.double().t() * row_scale * scale.double() + bias.double()
    dynamic = W8A8Dynamic(weight, scale, bias)
    check(W8A8Linear(dynamic, int8_product)(x), by_row)

    quant_bias = torch.randint(-3000, 3000, (20,), dtype=torch.int32)
    constants = (exact / 0.0203 + 11).round().clamp(-128, 127)  # cuts some off on both sides
    by_constants = (constants @ weight.double().t() + quant_bias) * scale.double()
    static = W8A8Static(weight, 0.0203, 11.0, quant_bias, scale)
    check(W8A8StaticLinear(static, int8_product)(x), by_constants)

    platform = CpuPlatform()
    for few_rows in (0, 16):
        platform._int8 = Int8Kernels(True, few_rows)
        for offset in (None, torch.randint(-9, 9, (20,)).float()):
            given_ = W8A16(weight, scale, offset, bias)
            want = exact @ given_.dense().double().t() + bias.double()
            layer = platform.pack_quantised(given_, dtype)
            # one more rounding in bfloat16, before the scale
            torch.testing.assert_close(layer(x).double(), want, rtol=2 * tolerance["rtol"], atol=3e-2)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_others(dtype: torch.dtype, native: bool) -> None:
    """Without the tiles that float layers need for it."""
    torch.manual_seed(1)
    platform = CpuPlatform()
    platform._int8 = Int8Kernels(True, 0, native)
    weight, scale = int8(96, 1100), torch.rand(96) / 100
    layers = [
        platform.pack_quantised(W8A8Dynamic(weight, scale, torch.randn(96)), dtype),
        platform.pack_quantised(
            W8A8Static(weight, 0.03, -7.0, torch.zeros(96, dtype=torch.int32), scale), dtype
        ),
    ]
    x = torch.randn(70, 1100).to(dtype)
    for layer in layers:
        assert not isinstance(layer, InvariantLinear)
        want = layer(x)
        for first, last in ((0, 1), (3, 5), (60, 69), (1, 70)):
            assert torch.equal(layer(x[first:last]), want[first:last])


def test_w8a16_is_tiled_where_a_step_asks_for_it() -> None:
    torch.manual_seed(2)
    platform = CpuPlatform()
    layer = platform.pack_quantised(W8A16(int8(96, 700), torch.rand(96) / 100, None, None), torch.bfloat16)
    x = torch.randn(37, 700).bfloat16()
    platform.arithmetic.invariant = True
    want = layer(x)
    assert all(torch.equal(layer(x[row : row + 1]), want[row : row + 1]) for row in range(37))


def test_a_product_that_saturates_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def saturating(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        pairs = q.int()[:, None].mul(weight.int()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1, dtype=torch.int32)

    monkeypatch.setattr(int8_kernels, "int8_product", saturating)
    monkeypatch.setattr(int8_kernels, "kernels", lambda: None)
    kernels = probe_int8(torch.bfloat16)
    assert not kernels.operator
    assert kernels.product is int8_product_in_float32
    assert "float32 is used" in caplog.text


def test_what_one_worker_found_another_adopts() -> None:
    first, second = CpuPlatform(), CpuPlatform()
    first.choose_kernels(torch.float32)
    first.choose_int8_kernels(torch.float32)
    second.adopt(first.findings())
    assert second._int8 == first._int8
    assert "int8 linears" in second.describe()


# --- whole models ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a float model and its three quantised ones."""
    home = tmp_path_factory.mktemp("quantised")
    write_model(SHAPE, home / "float", dtype="float32")
    texts = home / "texts"
    texts.write_text(TEXT)
    for scheme in SCHEMES:
        calibrate = ["--calibrate", str(texts)] if scheme == "w8a8" else []
        arguments = ["--model", str(home / "float"), "--out", str(home / scheme), "--scheme", scheme]
        assert quantize.main([*arguments, *calibrate]) == 0
    return home


_probe_once = functools.cache(probe_int8)  # it takes seconds, and the machine stays the same


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek-v2"])
def test_every_family_is_served_quantised(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near to what it says in floating point; routers and what is taken apart stay there."""
    monkeypatch.setattr("worker.platforms.cpu.probe_int8", _probe_once)
    write_checkpoint(tmp_path / "float", name)
    out = tmp_path / "int8"
    assert (
        quantize.main(["--model", str(tmp_path / "float"), "--out", str(out), "--scheme", "w8a8_dynamic"])
        == 0
    )
    types = Checkpoint(out).quantisation.types
    assert any(".self_attn.o_proj" in module for module in types)
    assert not any(module.endswith((".gate", ".kv_b_proj")) for module in types)
    text = list(range(5, 40))
    logits = []
    for folder in (tmp_path / "float", out):
        harness = Harness(folder)
        rows = [harness.sequence(text[:n]) for n in (35, 28, 20, 9, 3)]
        logits.append(harness.forward(StepKind.PREFILL, rows))
    off = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    assert 0 < off.median() < 0.2  # of order 1 if anything is mixed up; rows may go to other experts


def dequantised(source: Path, out: Path) -> None:
    """The float model that a checkpoint with weight_scale stands for."""
    shutil.copytree(source.parent / "float", out)
    tensors = load_file(next(source.glob("*.safetensors")))
    floats = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(_PARTS)}
    for name in tensors:
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            floats[f"{module}.weight"] *= tensors[name]
    save_file(floats, out / "model.safetensors", metadata={"format": "pt"})


_PARTS = (".weight_scale", ".weight_offset")


def logits_of(folder: Path) -> torch.Tensor:
    """On the text of the calibration."""
    ids = AutoTokenizer.from_pretrained(folder).encode(TEXT)
    harness = Harness(folder)
    return harness.forward(StepKind.PREFILL, [harness.sequence(ids)])[0]


def test_w8a16_computes_what_its_weights_stand_for(folder: Path, tmp_path: Path) -> None:
    dequantised(folder / "w8a16", tmp_path / "model")
    want = logits_of(tmp_path / "model")
    # float32 throughout, in another order
    torch.testing.assert_close(logits_of(folder / "w8a16"), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scheme", "most"), [("w8a8_dynamic", 0.08), ("w8a8", 0.12), ("w8a16", 0.06)])
def test_a_quantised_model_stays_near_the_float_one(folder: Path, scheme: str, most: float) -> None:
    want, got = logits_of(folder / "float"), logits_of(folder / scheme)
    assert 0 < (got - want).norm() < most * want.norm()


def test_weights_are_held_once_and_counted_in_bytes(folder: Path) -> None:
    runners = {name: Harness(folder / name).runner for name in ("float", "w8a8_dynamic")}
    float_bytes, int8_bytes = (runner.weight_bytes for runner in runners.values())
    linears = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96)
    rows = 2 * (64 * 2 + 2 * 32 + 2 * 96 + 64)
    assert int8_bytes == float_bytes - 3 * linears + 2 * 4 * rows


def test_a_tied_head_may_be_quantised_on_its_own(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder / "float"), "--scheme", "w8a16", "--out"]
    assert quantize.main([*arguments, str(tmp_path / "m"), "--head"]) == 0
    plain, own = Harness(folder / "w8a16").runner, Harness(tmp_path / "m").runner
    assert own.weight_bytes == plain.weight_bytes + 600 * (64 + 4 + 4)
    want, got = logits_of(folder / "w8a16"), logits_of(tmp_path / "m")
    assert 0 < (got - want).norm() < 0.02 * want.norm()
    wrong = change(tmp_path / "m", tmp_path / "wrong", lm_head__weight=torch.ones(600, 32, dtype=torch.int8))
    with pytest.raises(StartupError, match=r"lm_head.weight .* is \[600, 32\], expected \[600, 64\]"):
        Harness(wrong)


def change(source: Path, out: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a checkpoint with some tensors put in place of others; __ in a name stands for a dot."""
    shutil.copytree(source, out)
    file = next(out.glob("*.safetensors"))
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(file), **new}, file)
    return out


_Q = "model__layers__0__self_attn__q_proj__"


def test_bits_of_a_float32_in_an_int64_are_read(folder: Path, tmp_path: Path) -> None:
    stored = load_file(next((folder / "w8a8").glob("*.safetensors")))
    bits = {
        name.replace(".", "__"): tensor.view(torch.int32).long()
        for name, tensor in stored.items()
        if name.endswith("deq_scale")
    }
    assert torch.equal(logits_of(change(folder / "w8a8", tmp_path / "m", **bits)), logits_of(folder / "w8a8"))


def test_projections_with_constants_of_their_own_are_not_merged(folder: Path, tmp_path: Path) -> None:
    """A coarser scale for queries: theirs alone are rounded more."""
    stored = load_file(next((folder / "w8a8").glob("*.safetensors")))
    name = _Q.replace("__", ".")
    scale, deq, bias = (stored[f"{name}{part}"] for part in ("input_scale", "deq_scale", "quant_bias"))
    offset = stored[f"{name}input_offset"].item()
    sums = stored[f"{name}weight"].sum(1, dtype=torch.int64)
    real = (bias + sums * offset) * deq  # the bias itself
    coarser = {
        f"{_Q}input_scale": scale * 2,
        f"{_Q}deq_scale": deq * 2,
        f"{_Q}quant_bias": (real / (deq * 2) - sums * offset).round().int(),
    }
    other = change(folder / "w8a8", tmp_path / "m", **coarser)
    layers = Harness(other).runner._model._layers  # type: ignore[attr-defined]
    assert isinstance(layers[0]._attention._qkv._linear, SideBySide)
    assert not isinstance(layers[1]._attention._qkv._linear, SideBySide)
    want, got = logits_of(folder / "w8a8"), logits_of(other)
    assert 0 < (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("beside", [False, True])
def test_a_norm_may_have_a_bias(folder: Path, tmp_path: Path, beside: bool) -> None:
    """It reaches the layer behind as if it were part of that one's own."""
    norm = "model.layers.1.input_layernorm."
    torch.manual_seed(3)
    shift = torch.randn(64) / 4
    weight = load_file(folder / "float" / "model.safetensors")[f"{norm}weight"]
    name = norm.replace(".", "__")
    parts = {f"{name}bias": shift}
    if beside:
        parts = {f"{name}module__weight": weight, f"{name}module__bias": shift, f"{name}weight": weight * 7}
    dequantised(folder / "w8a16", tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    for projection in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.1.self_attn.{projection}"
        tensors[f"{module}.bias"] += tensors[f"{module}.weight"] @ shift
    save_file(tensors, file)
    got = logits_of(change(folder / "w8a16", tmp_path / "m", **parts))
    assert (got - logits_of(folder / "w8a16")).norm() > 0.03
    torch.testing.assert_close(got, logits_of(tmp_path / "float"), rtol=1e-4, atol=1e-4)


def test_a_norm_for_quantised_layers_needs_all_of_them(folder: Path, tmp_path: Path) -> None:
    norm = "model__layers__0__post_attention_layernorm__module__"
    spoiled = change(
        folder / "w8a8_dynamic",
        tmp_path / "m",
        model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64),
        **{f"{norm}weight": torch.ones(64), f"{norm}bias": torch.ones(64)},
    )
    file = spoiled / "quant_model_description.json"
    description = json.loads(file.read_text())
    tensors = load_file(next(spoiled.glob("*.safetensors")))
    for part in ("weight_scale", "weight_offset"):
        tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
        description.pop(f"model.layers.0.mlp.up_proj.{part}")
    save_file(tensors, next(spoiled.glob("*.safetensors")))
    file.write_text(json.dumps({**description, "model.layers.0.mlp.up_proj.weight": "FLOAT"}))
    with pytest.raises(
        StartupError, match=r"post_attention_layernorm\.module\.weight .* all must be, or none"
    ):
        Harness(spoiled)


@pytest.mark.parametrize(
    ("scheme", "tensors", "words"),
    [
        ("w8a8_dynamic", {f"{_Q}weight_offset": torch.ones(64, 1)}, "weight_offset must be all zero"),
        ("w8a16", {f"{_Q}weight_scale": torch.full((64, 1), float("nan"))}, "weight_scale must be finite"),
        ("w8a8", {f"{_Q}input_scale": torch.zeros(1)}, "input_scale must be above 0"),
        ("w8a8", {f"{_Q}input_offset": torch.tensor([0.5])}, "input_offset must be a whole number"),
        ("w8a16", {f"{_Q}weight": torch.ones(64, 32, dtype=torch.int8)}, "is [64, 32], expected [64, 64]"),
        ("w8a16", {"model__layers__0__input_layernorm__bias": torch.ones(9)}, "is [9], expected [64]"),
        ("w8a16", {f"{_Q}strange": torch.ones(1)}, "q_proj.strange"),
    ],
)
def test_unusable_values_are_refused_with_the_tensors_name(
    folder: Path, tmp_path: Path, scheme: str, tensors: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(StartupError) as caught:
        Harness(change(folder / scheme, tmp_path / "m", **tensors), MODEL)
    assert words in str(caught.value) and "\n" not in str(caught.value)
