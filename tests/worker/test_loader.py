"""Checkpoints that do not fit are refused in one line that says what is wrong; others load whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import EXIT_INIT, StartupError
from engine.plan import StepKind
from tests.worker.conftest import Harness, write_checkpoint
from worker.loader import Checkpoint


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    made = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(3, 3, dtype=torch.bfloat16),
        "c": torch.zeros(4),
    }
    save_file(made, tmp_path / "model.safetensors")
    return made


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(StartupError) as caught:
        act()
    assert caught.value.exit_code == EXIT_INIT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_take_joins_and_converts(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint(tmp_path)
    joined = checkpoint.take("b", "a", dtype=torch.float32)
    assert torch.equal(joined, torch.cat([tensors["b"].float(), tensors["a"]]))


def test_taken_tensors_survive_the_release_of_their_file(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    checkpoint = Checkpoint(tmp_path)
    taken = checkpoint.take("a", dtype=torch.float32)
    checkpoint.release()
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(taken, tensors["a"])


@pytest.mark.usefixtures("tensors")
def test_all_mismatches_are_named_at_once_with_file_and_shapes(tmp_path: Path) -> None:
    message = refusal(lambda: Checkpoint(tmp_path).check({"a": (2, 4), "b": (3, 3), "d": (5,)}))
    assert "a in model.safetensors is [2, 3], expected [2, 4]" in message
    assert "d [5] is missing" in message
    assert "c in model.safetensors is unexpected" in message
    assert "b in" not in message


@pytest.mark.usefixtures("tensors")
def test_ignorable_tensors_are_no_mismatch(tmp_path: Path) -> None:
    Checkpoint(tmp_path).check({"a": (2, 3), "b": (3, 3)}, frozenset({"c", "never there"}))


@pytest.mark.usefixtures("tensors")
def test_the_stored_dtype_is_that_of_most_weights(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path).stored_dtype == torch.float32


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    assert "model.safetensors" in refusal(lambda: Checkpoint(tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert str(tmp_path / "model.safetensors") in refusal(lambda: Checkpoint(tmp_path))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    message = refusal(lambda: Checkpoint(tmp_path))
    assert "two.safetensors" in message
    assert "one.safetensors" not in message


def test_a_shard_that_lacks_its_tensor_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    assert "one.safetensors lacks b" in refusal(lambda: Checkpoint(tmp_path))


def test_a_sharded_checkpoint_computes_what_the_single_file_does(tmp_path: Path) -> None:
    logits = []
    for name, save in {"single": {}, "sharded": {"max_shard_size": "50KB"}}.items():
        folder = tmp_path / name
        write_checkpoint(folder, "llama", **save)
        harness = Harness(folder)
        logits.append(harness.forward(StepKind.PREFILL, [harness.sequence([5, 6, 7])]))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(*logits)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_checkpoint_of_another_shape_is_refused_by_the_runner(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    edit(tmp_path, intermediate_size=96, num_hidden_layers=2)
    message = refusal(lambda: Harness(tmp_path))
    assert "model.layers.0.mlp.up_proj.weight in model.safetensors is [80, 48], expected [96, 48]" in message
    assert "model.layers.2.mlp.down_proj.weight in model.safetensors is unexpected" in message


def test_leftovers_of_older_exports_are_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2-tied")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    Harness(tmp_path)


@pytest.mark.parametrize("weight_map", [["model.norm.weight"], {"model.norm.weight": 3}, "all"])
def test_a_malformed_index_is_refused_by_name(tmp_path: Path, weight_map: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(StartupError, match=f"{index}: weight_map"):
        Checkpoint(tmp_path)
