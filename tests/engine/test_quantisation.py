"""How a checkpoint says that it is quantised, and every way in which it may say it wrongly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.quantisation import Quantisation, read_quantisation
from engine.weight_files import WeightFault, read_weights

_BYTES = {"I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
Headers = dict[str, tuple[str, tuple[int, ...]]]
_Q = "model.layers.0.self_attn.q_proj"
_UP = "model.layers.0.mlp.up_proj"

STATIC: Headers = {
    f"{_Q}.weight": ("I8", (6, 4)),
    f"{_Q}.input_scale": ("BF16", (1,)),
    f"{_Q}.input_offset": ("BF16", (1,)),
    f"{_Q}.quant_bias": ("I32", (6,)),
    f"{_Q}.deq_scale": ("I64", (6,)),
}
DYNAMIC: Headers = {
    f"{_UP}.weight": ("I8", (8, 4)),
    f"{_UP}.weight_scale": ("F32", (8, 1)),
    f"{_UP}.weight_offset": ("F32", (8, 1)),
}
FLOAT: Headers = {"model.embed_tokens.weight": ("BF16", (10, 4)), "model.norm.weight": ("BF16", (4,))}


def put_weights(file: Path, tensors: Headers) -> None:
    """A safetensors file of zeros."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


class Checkpoint:
    """A directory to be spoiled before it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scheme: Any = "w8a8"
        self.tensors: Headers = {**FLOAT, **STATIC, **DYNAMIC}
        self.description: dict[str, Any] = {
            "model_quant_type": "W8A8",
            **dict.fromkeys(FLOAT, "FLOAT"),
            **dict.fromkeys(STATIC, "W8A8"),
            **dict.fromkeys(DYNAMIC, "W8A8_DYNAMIC"),
        }
        self.description_name: str | None = "quant_model_description.json"

    def read(self) -> Quantisation:
        config = {} if self.scheme is None else {"quantize": self.scheme}
        (self.folder / "config.json").write_text(json.dumps(config))
        put_weights(self.folder / "quant_model_weight_w8a8.safetensors", self.tensors)
        if self.description_name:
            (self.folder / self.description_name).write_text(json.dumps(self.description))
        return read_quantisation(self.folder, read_weights(self.folder))

    def faults(self) -> list[str]:
        with pytest.raises(WeightFault) as caught:
            self.read()
        assert all("\n" not in fault and str(self.folder) in fault for fault in caught.value.faults)
        return list(caught.value.faults)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


def test_types_extras_and_bytes(checkpoint: Checkpoint) -> None:
    found = checkpoint.read()
    assert found.types == {_Q: "W8A8", _UP: "W8A8_DYNAMIC"}
    assert found.type_of("model.norm") == "FLOAT"
    assert found.extras == (STATIC.keys() | DYNAMIC.keys()) - {f"{_Q}.weight", f"{_UP}.weight"}
    assert not found.int8_kv
    # int8 weights, float32 or int32 beside them, and what was float before in the dtype computed in
    held = (24 + 32) + 4 * (1 + 1 + 6 + 6 + 8 + 8) + 44 * 2
    assert found.bytes_held(read_weights(checkpoint.folder), 2) == held


@pytest.mark.parametrize("key", ["kv_cache_type", "kv_quant_type"])
def test_c8_asks_for_an_int8_cache(checkpoint: Checkpoint, key: str) -> None:
    checkpoint.description[key] = "C8"
    for part in ("kv_cache_scale", "kv_cache_offset"):
        name = f"model.layers.0.self_attn.k_proj.{part}"
        checkpoint.tensors[name] = ("F32", (4,))
        checkpoint.description[name] = "W8A8"
    found = checkpoint.read()
    assert found.int8_kv
    assert {name for name in found.extras if "kv_cache" in name} == {
        name for name in checkpoint.tensors if "kv_cache" in name
    }


@pytest.mark.parametrize("name", ["quant_model_description_w8a8.json", "quant_model_description_mine.json"])
def test_the_description_may_carry_an_ending(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.description_name = name
    assert checkpoint.read().scheme == "w8a8"


def test_the_schemes_own_description_is_taken_before_others(checkpoint: Checkpoint) -> None:
    (checkpoint.folder / "quant_model_description_w8a16.json").write_text("{}")
    checkpoint.description_name = "quant_model_description_w8a8.json"
    assert checkpoint.read().types


def test_a_float_checkpoint_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    put_weights(tmp_path / "model.safetensors", FLOAT)
    assert read_quantisation(tmp_path, read_weights(tmp_path)) == Quantisation()


Change = Callable[[Checkpoint], None]


def _put(**changes: Any) -> Change:
    return lambda checkpoint: vars(checkpoint).update(changes)


def _retype(name: str, dtype: str, shape: tuple[int, ...]) -> Change:
    return lambda checkpoint: checkpoint.tensors.update({name: (dtype, shape)})


def _describe(name: str, kind: Any) -> Change:
    return lambda checkpoint: checkpoint.description.update({name: kind})


def _drop(name: str) -> Change:
    def change(checkpoint: Checkpoint) -> None:
        del checkpoint.tensors[name]
        checkpoint.description.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_put(scheme=None), ['"quantize" is missing', "w8a8, w8a8_dynamic, w8a16", "config.json"]),
        (_put(scheme=None, description_name=None), ['"quantize" is missing', "2 int8 tensors"]),
        (_put(scheme="w4a8"), ["'w4a8' is not supported", "w8a16"]),
        (_put(scheme="w8a8s"), ["'w8a8s' is not supported"]),
        (_put(scheme=8), ["8 is not supported"]),
        (_put(description_name=None), ["needs a quant_model_description.json", "found none"]),
        (_describe("model.layers.9.gone.weight", "W8A8"), ["model.layers.9.gone.weight", "do not have"]),
        (_describe(f"{_Q}.weight", "W4A8_DYNAMIC"), ["W4A8_DYNAMIC", _Q, "FLOAT, W8A8, W8A8_DYNAMIC"]),
        (_describe(f"{_Q}.weight", ["W8A8"]), ["['W8A8']", "not supported"]),
        (_put(scheme="w8a16"), ["W8A8", "not supported with quantize w8a16"]),
        (_describe(f"{_Q}.weight", "FLOAT"), [f"{_Q}.weight is int8, but described as FLOAT"]),
        (_describe("model.norm.weight", "W8A16"), ["W8A16 of model.norm.weight"]),
        (_describe("model.embed_tokens.weight", "W8A8"), ["stored as BF16"]),
        (_describe("kv_cache_type", "C4"), ["kv_cache_type", "C4"]),
        (_describe("fa_quant_type", "FAQuant"), ["FAQuant"]),
        (_drop(f"{_Q}.deq_scale"), [f"{_Q}.weight is W8A8, but {_Q}.deq_scale is missing"]),
        (_drop(f"{_UP}.weight_scale"), [f"{_UP}.weight_scale is missing"]),
        (_retype(f"{_Q}.quant_bias", "F32", (6,)), ["quant_bias is stored as F32, expected one of I32"]),
        (_retype(f"{_Q}.deq_scale", "F32", (5,)), ["[5], expected [6]"]),
        (_retype(f"{_UP}.weight_scale", "F32", (8, 2)), ["[8, 2], expected [8]", "groups"]),
    ],
)
def test_what_is_wrong_is_told_in_one_line(checkpoint: Checkpoint, change: Change, words: list[str]) -> None:
    change(checkpoint)
    told = checkpoint.faults()
    assert any(all(word in fault for word in words) for fault in told), told


def test_an_offset_that_is_not_stored_is_none(checkpoint: Checkpoint) -> None:
    _drop(f"{_UP}.weight_offset")(checkpoint)
    assert checkpoint.read().types[_UP] == "W8A8_DYNAMIC"


def test_a_scheme_that_nothing_follows_is_a_mistake(checkpoint: Checkpoint) -> None:
    checkpoint.tensors = dict(FLOAT)
    checkpoint.description = dict.fromkeys(FLOAT, "FLOAT")
    assert "no tensor is quantised" in checkpoint.faults()[0]


def test_many_faults_are_cut(checkpoint: Checkpoint) -> None:
    for number in range(30):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        checkpoint.tensors[name] = ("I8", (4, 4))
        checkpoint.description[name] = "W8A8"
    assert len(checkpoint.faults()) == 11


def test_two_checkpoints_in_one_directory_are_refused(checkpoint: Checkpoint) -> None:
    put_weights(checkpoint.folder / "quant_model_weight_w8a16.safetensors", DYNAMIC)
    assert "2 checkpoints" in checkpoint.faults()[0]
