"""The quantising script: what it writes, in how many files, and what it refuses."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.quantisation import read_quantisation
from engine.weight_files import read_weights
from scripts import quantize
from scripts.layerwise import read_texts
from scripts.write_random_model import Shape, write_model
from worker.loader import Checkpoint

SHAPE = Shape("qwen2", layers=2, hidden=32, heads=4, kv_heads=2, intermediate=48, vocab=400, tied=True)
UP = "model.layers.1.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    write_model(SHAPE, folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    chat = {"question": "badebi dafudi?", "answer": " gika"}
    file.write_text(f"a line\n\n{json.dumps(chat)}\n")
    return file


def run(model: Path, out: Path, scheme: str, *more: str) -> int:
    return quantize.main(["--model", str(model), "--out", str(out), "--scheme", scheme, *more])


def stored(out: Path) -> dict[str, torch.Tensor]:
    files = sorted(out.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("scheme", "kind"), [("w8a8_dynamic", "W8A8_DYNAMIC"), ("w8a16", "W8A16")])
def test_weights_are_rounded_to_half_a_step_and_the_rest_is_kept(
    model: Path, tmp_path: Path, scheme: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(model, out, scheme) == 0
    before, after = load_file(model / "model.safetensors"), stored(out)
    found = read_quantisation(out, read_weights(out))
    assert found.scheme == scheme
    assert len(found.types) == 2 * 7 and set(found.types.values()) == {kind}
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in found.types:
            scale = after[f"{module}.weight_scale"]
            assert after[name].abs().amax(1).eq(127).all(), "each row uses the whole range"
            assert ((after[name] * scale - tensor.float()).abs() <= scale * 0.5001).all()
            assert after[f"{module}.weight_offset"].eq(0).all()
        else:
            assert torch.equal(after[name].to(tensor.dtype), tensor), name
    assert json.loads((out / "config.json").read_text())["quantize"] == scheme
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}
    said = capsys.readouterr().out
    assert "14 layers in int8" in said and "eval_accuracy.py" in said


def test_static_parts_give_the_bias_back(model: Path, tmp_path: Path, texts: Path) -> None:
    """An input of zeros leaves the bias, to half a step of the result."""
    out = tmp_path / "out"
    assert run(model, out, "w8a8", "--calibrate", str(texts)) == 0
    before, after = load_file(model / "model.safetensors"), stored(out)
    assert f"{Q}.bias" not in after
    scale, offset, deq, bias = (
        after[f"{Q}.{part}"] for part in ("input_scale", "input_offset", "deq_scale", "quant_bias")
    )
    zeros = torch.full((SHAPE.hidden,), int(offset.item()))
    got = (after[f"{Q}.weight"].int() @ zeros.int() + bias) * deq
    assert ((got - before[f"{Q}.bias"].float()).abs() <= deq * 0.51).all()
    assert scale.item() > 0 and offset.item() == round(offset.item())
    # the merged layer has one input: its constants agree
    for other in ("k_proj", "v_proj"):
        assert after[Q.replace("q_proj", other) + ".input_scale"] == scale


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 0.0), (0.0, 2.0), (-4.0, 0.0), (-1e-3, 9.0)])
def test_constants_reach_both_ends_and_keep_zero(low: float, high: float) -> None:
    scale, offset = quantize.input_constants(low, high)
    assert offset == round(offset) and -128 <= offset <= 127
    assert low / scale + offset >= -128.5 and high / scale + offset <= 127.5


def test_shards_hold_the_same_as_one_file(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "one", "w8a16") == 0
    writer = quantize.Writer(tmp_path, "quant_model_weight_w8a16", 6_000)
    checkpoint = Checkpoint(model)
    quantize.quantise(checkpoint, writer, "W8A16", [], {})
    files = writer.close()
    assert files > 3, files
    (tmp_path / "config.json").write_text('{"quantize": "w8a16"}')
    (tmp_path / "quant_model_description.json").write_text(json.dumps(writer.description))
    want, tensors = stored(tmp_path / "one"), read_weights(tmp_path)
    assert len({tensor.file for tensor in tensors.values()}) == files
    got = stored(tmp_path)
    assert got.keys() == want.keys() == tensors.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not list(tmp_path.glob("*.part"))


def test_a_tied_head_gets_a_copy_of_its_own(model: Path, tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    assert run(model, out, "w8a8", "--calibrate", str(texts), "--head") == 0
    types = read_quantisation(out, read_weights(out)).types
    assert types["lm_head"] == "W8A8_DYNAMIC" and types[UP] == "W8A8"
    before, after = load_file(model / "model.safetensors"), stored(out)
    embedding, scale = before["model.embed_tokens.weight"], after["lm_head.weight_scale"]
    assert torch.equal(after["model.embed_tokens.weight"], embedding)
    assert ((after["lm_head.weight"] * scale - embedding.float()).abs() <= scale * 0.5001).all()


def test_the_loss_of_both_is_told(
    model: Path, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path / "out", "w8a8_dynamic", "--check", str(texts)) == 0
    said = capsys.readouterr().out
    found = re.search(r"loss per token on 2 texts .*: ([0-9.]+) before, ([0-9.]+) after", said)
    assert found is not None, said
    ids = read_texts(model, texts, 9, 99)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = [reference(torch.tensor([text]), labels=torch.tensor([text])).loss.item() for text in ids]
    weights = [len(text) - 1 for text in ids]
    want = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    # the checkpoint is in bfloat16
    assert float(found[1]) == pytest.approx(want, rel=1e-2)
    assert float(found[2]) == pytest.approx(want, rel=3e-2)


def test_layers_can_be_left_as_they_are(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(model, out, "w8a8_dynamic", "--keep", "down_proj", "--keep", "layers.0.") == 0
    types = read_quantisation(out, read_weights(out)).types
    assert len(types) == 6 and UP in types
    assert not any("down_proj" in module or "layers.0." in module for module in types)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "w8a16", "--keep", "layers"], "leaves no layer"),
        (["--scheme", "w8a8", "--calibrate", "{empty}"], "holds no text"),
        (["--scheme", "w8a8", "--calibrate", "{broken}"], '"question" and "answer"'),
        (["--scheme", "w8a8", "--calibrate", "{none}"], "No such file"),
    ],
)
def test_what_cannot_be_done_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "broken").write_text('{"question": "?"}\n')
    files = {name: tmp_path / name for name in ("empty", "broken", "none")}
    out = tmp_path / "out"
    given = [argument.format(**files) for argument in arguments]
    assert quantize.main(["--model", str(model), "--out", str(out), *given]) == 2
    assert words in capsys.readouterr().err


def test_what_is_there_is_replaced_only_by_force(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(model, out, "w8a16") == 0
    assert run(model, out, "w8a8_dynamic") == 2
    assert "--force" in capsys.readouterr().err
    assert run(model, out, "w8a8_dynamic", "--force") == 0
    assert read_quantisation(out, read_weights(out)).scheme == "w8a8_dynamic"
    assert run(out, tmp_path / "again", "w8a16") == 2
    assert "quantised already" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--scheme", "w8a8"], ["--scheme", "w8a16", "--calibrate", "x"]])
def test_texts_go_with_the_scheme_that_needs_them(model: Path, tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        quantize.main(["--model", str(model), "--out", str(tmp_path / "out"), *arguments])
