"""config.json in its two layouts, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import StartupError
from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig, RopeConfig, eos_token_ids
from worker.hf_config import parse_rope as parse_rope_of
from worker.layers.rotary import inverse_frequencies
from worker.models.llama import LlamaForCausalLM
from worker.models.registry import model_class
from worker.models.table import GENERIC, MODELS

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

FILE = Path("/models/some/config.json")


def parse_rope(config: dict[str, Any], max_positions: int) -> RopeConfig:
    return parse_rope_of(ConfigValues(FILE, config), max_positions)


def parse_llama(change: dict[str, Any]) -> DecoderConfig:
    return LlamaForCausalLM.parse_config(ConfigValues(FILE, BASE | change))


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
        parse_llama(change)


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "key", "found"),
    [
        ({"num_key_value_heads": "2"}, "num_key_value_heads", '"2"'),
        ({"num_key_value_heads": -2}, "num_key_value_heads", "-2"),
        ({"num_attention_heads": [4]}, "num_attention_heads", "[4]"),
        ({"num_attention_heads": 5}, "hidden_size", "64"),
        ({"rms_norm_eps": None}, "rms_norm_eps", "null"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps", '"1e-6"'),
        ({"rms_norm_eps": NAN}, "rms_norm_eps", "NaN"),
        ({"rms_norm_eps": True}, "rms_norm_eps", "true"),
        ({"head_dim": 64.0}, "head_dim", "64.0"),
        ({"vocab_size": True}, "vocab_size", "true"),
        ({"vocab_size": 10**400}, "vocab_size", "1000"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers", str(2**30)),
        ({"max_position_embeddings": None}, "max_position_embeddings", "null"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings", '"no"'),
        ({"attention_bias": 1}, "attention_bias", "1"),
        ({"hidden_act": ["silu"]}, "hidden_act", '["silu"]'),
        ({"quantization_config": ["awq"]}, "quantization_config", '["awq"]'),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor", '"half"'),
        ({"rope_theta": 0}, "rope_theta", "0"),
        ({"rope_theta": "10000"}, "rope_theta", '"10000"'),
        ({"rope_theta": 10**400}, "rope_theta", "1000"),
        ({"rope_parameters": [1]}, "rope_parameters", "[1]"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention",
            "yarn",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling", '"linear"'),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling.type", '["linear"]'),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling.factor", '"x"'),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "rope_scaling.factor", "Infinity"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor", "0.5"),
        ({"rope_scaling": {"type": "yarn", "beta_slow": 1e-320}}, "rope_scaling.beta_slow", "e-32"),
        ({"rope_scaling": {"type": "yarn", "attention_factor": "1"}}, "rope_scaling.attention_factor", '"1"'),
        ({"rope_scaling": {"type": "yarn", "truncate": 0}}, "rope_scaling.truncate", "0"),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512}},
            "rope_scaling.original_max_position_embeddings",
            "512",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}},
            "rope_scaling.low_freq_factor",
            "4.0",
        ),
    ],
)
def test_a_malformed_value_is_refused_in_one_line_with_file_key_and_value(
    change: dict[str, Any], key: str, found: str
) -> None:
    with pytest.raises(StartupError) as caught:
        parse_llama(change)
    message = str(caught.value)
    assert message.startswith(f"{FILE}: {key} ")
    assert found in message
    assert "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    "key", ["num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "rope_theta"]
)
def test_null_is_the_default_where_exporters_write_it(key: str) -> None:
    assert parse_llama({key: None}) == parse_llama({})


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ROPE_KEYS = [
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor",
]  # fmt: skip
KEYS = [
    *BASE, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "architectures", "original_max_position_embeddings", "quantization_config",
    "use_sliding_window", "eos_token_id",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    change=st.dictionaries(st.sampled_from(KEYS), junk, max_size=3),
    kind=st.sampled_from(["default", "linear", "llama3", "yarn"]),
    rope=st.dictionaries(st.sampled_from(ROPE_KEYS), junk | st.floats(0, 1e300), max_size=3),
)
def test_any_config_is_either_read_or_refused(
    change: dict[str, Any], kind: str, rope: dict[str, Any]
) -> None:
    """Nothing but StartupError comes out, and what is read can be computed with."""
    scaling = {"rope_type": kind, "factor": 2.0, **rope}
    config = ConfigValues(FILE, {**BASE, "rope_scaling": scaling, **change})
    for family in (*MODELS.values(), GENERIC):
        try:
            eos_token_ids(Path("/nowhere"), config)
            parsed = family.parse(config)
        except StartupError:
            continue
        frequencies, factor = inverse_frequencies(parsed.rope, 16)
        assert frequencies.isfinite().all() and math.isfinite(factor)
        assert parsed.usable_positions >= parsed.max_position_embeddings
    if "architectures" in change:  # made of at most 3 letters
        with pytest.raises(StartupError, match="architectures"):
            model_class(config)


@pytest.mark.parametrize(
    ("positions", "scaling", "want"),
    [
        (256, None, 256),
        (256, {"rope_type": "linear", "factor": 4.0}, 256),
        # the length before the extension, as Qwen2.5 gives it, and after it, as others do
        (64, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (64, {"rope_type": "yarn", "factor": 2.5}, 160),
        # Llama 3.1: 8 x 8192 is less than the length it was trained on afterwards
        (1024, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 1024),
        (64, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
        (64, {"rope_type": "yarn", "factor": 1e12}, 2**31 - 1),
    ],
)
def test_the_usable_length_includes_the_extension(
    positions: int, scaling: dict[str, Any] | None, want: int
) -> None:
    assert (
        parse_llama({"max_position_embeddings": positions, "rope_scaling": scaling}).usable_positions == want
    )


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_windows_of_some_layers_are_refused_only_when_in_use(name: str) -> None:
    parse = MODELS[name].parse
    window = {**BASE, "sliding_window": 4096}
    assert parse(ConfigValues(FILE, {**window, "use_sliding_window": False})).window is None
    with pytest.raises(StartupError, match="use_sliding_window"):
        parse(ConfigValues(FILE, {**window, "use_sliding_window": True}))


@pytest.mark.parametrize(
    ("given", "want"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_the_window_of_mistral(given: dict[str, Any], want: int | None) -> None:
    """4096 where nothing is said, as transformers reads it."""
    parsed = MODELS["MistralForCausalLM"].parse(ConfigValues(FILE, BASE | given))
    assert parsed.window == want == MistralConfig(**BASE, **given).sliding_window


def test_the_table_and_the_classes_agree() -> None:
    for name, family in [*MODELS.items(), ("", GENERIC)]:
        config = ConfigValues(FILE, {"architectures": [name or "GPT2LMHeadModel"]})
        assert model_class(config).parse_config is family.parse


@pytest.mark.parametrize("architectures", [["T5ForConditionalGeneration"], ["BertModel"], [], None])
def test_an_unsupported_architecture_lists_the_supported_ones(architectures: list[str] | None) -> None:
    with pytest.raises(StartupError) as caught:
        model_class(ConfigValues(FILE, {"architectures": architectures}))
    for name in (str(FILE), "architectures", *MODELS, *(architectures or [])):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"text_config": {}}, "text_config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"num_attention_heads": None}, "num_attention_heads, n_head, n_heads"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers"),
    ],
)
def test_what_no_decoder_of_plain_attention_has_is_refused_by_name(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(StartupError, match=named):
        GENERIC.parse(ConfigValues(FILE, BASE | change))


def test_sizes_under_the_names_of_others() -> None:
    gpt2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": None}
    parsed = GENERIC.parse(ConfigValues(FILE, gpt2))
    assert (parsed.num_layers, parsed.num_kv_heads, parsed.head_dim) == (2, 4, 16)
    assert (parsed.intermediate_size, parsed.usable_positions, parsed.window) == (256, 256, None)


@pytest.mark.parametrize("architectures", [[["x"]], "LlamaForCausalLM", 3, {}])
def test_architectures_must_be_a_list_of_strings(architectures: object) -> None:
    with pytest.raises(StartupError, match="architectures must be a list of strings"):
        model_class(ConfigValues(FILE, {"architectures": architectures}))


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
    assert eos_token_ids(tmp_path, ConfigValues(FILE, config)) == want


@pytest.mark.parametrize("value", ["2", -1, True, [[2]], 1.0, {"id": 2}])
def test_malformed_eos_ids_are_refused_with_the_file_they_stand_in(tmp_path: Path, value: object) -> None:
    with pytest.raises(StartupError, match=f"{FILE}: eos_token_id"):
        eos_token_ids(tmp_path, ConfigValues(FILE, {"eos_token_id": value}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(StartupError, match=r"generation_config\.json: eos_token_id"):
        eos_token_ids(tmp_path, ConfigValues(FILE, {"eos_token_id": 2}))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StartupError, match=str(file)):
        ConfigValues.read(file)
