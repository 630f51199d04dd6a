"""The random model script: its checkpoints load everywhere, and what they say moves."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.config_values import ConfigValues
from worker.models.registry import model_class

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "write_random_model.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_random_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


script = _load()
SMALL = ("tiny64", "llama-tiny", "qwen3-moe-tiny", "deepseek-v3-tiny")


@pytest.fixture(scope="module", params=SMALL)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("random") / request.param
    script.write_model(script.SHAPES[request.param], out, seed=3)
    return request.param, out


def test_greedy_output_varies_and_is_whole_words(written: tuple[str, Path]) -> None:
    """A random tied model that was not balanced repeats one token from the first step on."""
    _, path = written
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(script.FIRST_WORD, model.config.vocab_size, (4, 32), generator=generator)
    with torch.inference_mode():
        text = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False
        )
    outputs = text[:, 32:].tolist()
    assert len({tuple(ids) for ids in outputs}) == 4
    for ids in outputs:
        assert len(ids) == 64, "an end token was generated"
        assert len(set(ids)) > 32
        assert min(ids) >= script.FIRST_WORD
        assert len(tokenizer.decode(ids).split()) == 64


def test_every_id_of_the_model_decodes_to_text_of_its_own(written: tuple[str, Path]) -> None:
    name, path = written
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    vocab = script.SHAPES[name].vocab
    assert tokenizer.get_vocab_size() == vocab
    words = [tokenizer.decode([index]) for index in range(script.FIRST_WORD, vocab)]
    assert len(set(words)) == len(words)
    assert all(text.startswith(" ") and text.isprintable() for text in words)
    ids = list(range(script.FIRST_WORD, vocab))
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids


@pytest.mark.parametrize("text", ["Grüße, 你好 🎉\n\x00\x7f", "2 + 2 = 4", ""])
def test_any_text_survives_the_tokenizer(written: tuple[str, Path], text: str) -> None:
    tokenizer = Tokenizer.from_file(str(written[1] / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_marks_turns(written: tuple[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written[1])
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", list(script.SHAPES))
def test_tensors_are_the_ones_the_server_expects(name: str) -> None:
    """Checked on the meta device: no memory is taken for the large shapes."""
    shape = script.SHAPES[name]
    config = script.model_config(shape, "bfloat16")
    values = ConfigValues(Path("config.json"), config)
    cls = model_class(values)
    with torch.device("meta"):
        written = {key: tuple(tensor.shape) for key, tensor in script.tensors(shape, 0, torch.bfloat16)}
    assert written == cls.tensor_shapes(cls.parse_config(values))


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    def first(seed: int, out: str) -> torch.Tensor:
        script.write_model(script.SHAPES["tiny64"], tmp_path / out, seed)
        with safe_open(str(tmp_path / out / "model.safetensors"), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor("model.layers.1.mlp.up_proj.weight")
        return tensor

    assert torch.equal(first(1, "a"), first(1, "b"))
    assert not torch.equal(first(1, "a"), first(2, "c"))


def test_dtype_and_modes(tmp_path: Path) -> None:
    """The server checks that nobody else can read or change a model directory."""
    out = tmp_path / "model"
    assert script.main(["--shape", "tiny64", "--out", str(out), "--dtype", "float32"]) == 0
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    with safe_open(str(out / "model.safetensors"), framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype is torch.float32
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}


def test_an_existing_model_is_kept_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert script.main(["--shape", "tiny64", "--out", str(tmp_path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert script.main(["--shape", "tiny64", "--out", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("size", [100, 10_000_000])
def test_impossible_vocabulary_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        script.tokenizer_json(size)
