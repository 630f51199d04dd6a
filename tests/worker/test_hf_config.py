"""config.json in its two layouts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import StartupError
from worker.hf_config import eos_token_ids, parse_rope
from worker.layers.rotary import inverse_frequencies
from worker.models.llama import LlamaForCausalLM
from worker.models.qwen2 import Qwen2ForCausalLM
from worker.models.registry import MODELS, model_class

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.5},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_equal_those_of_transformers(scaling: dict[str, Any]) -> None:
    parameters = {**scaling, "rope_theta": 50000.0}
    want, want_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        LlamaConfig(**BASE, rope_parameters=dict(parameters)), device="cpu"
    )
    got, factor = inverse_frequencies(parse_rope({"rope_parameters": parameters}, 256), head_dim=16)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # float32, one rounding apart
    assert factor == pytest.approx(want_factor)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_both_layouts_mean_the_same(scaling: dict[str, Any]) -> None:
    new = parse_rope({"rope_parameters": {**scaling, "rope_theta": 50000.0}}, 256)
    assert parse_rope({"rope_scaling": scaling, "rope_theta": 50000.0}, 256) == new
    oldest = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert parse_rope({"rope_scaling": oldest, "rope_theta": 50000.0}, 256) == new


def test_no_scaling_in_either_layout() -> None:
    assert parse_rope({"rope_theta": 1e6, "rope_scaling": None}, 256).theta == 1e6
    assert parse_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 256).theta == 1e6
    assert parse_rope({}, 256).theta == 10000.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"head_dim": 5}, "head_dim"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        LlamaForCausalLM.parse_config(BASE | change)


def test_a_sliding_window_is_refused_only_when_in_use() -> None:
    assert Qwen2ForCausalLM.parse_config(BASE | {"sliding_window": 4096, "use_sliding_window": False})
    with pytest.raises(StartupError, match="use_sliding_window"):
        Qwen2ForCausalLM.parse_config(BASE | {"sliding_window": 4096, "use_sliding_window": True})


@pytest.mark.parametrize("architectures", [["MambaForCausalLM"], [], None])
def test_an_unsupported_architecture_lists_the_supported_ones(architectures: list[str] | None) -> None:
    with pytest.raises(StartupError) as caught:
        model_class(architectures)
    for name in (*MODELS, *(architectures or [])):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 9]}, (7, 9)),
        ({"eos_token_id": [4, 5]}, {}, (4, 5)),
        ({"eos_token_id": 0}, {"eos_token_id": None}, (0,)),
        ({}, None, ()),
    ],
)
def test_eos_ids(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, want: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path, config) == want
