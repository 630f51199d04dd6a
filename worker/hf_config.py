"""config.json and generation_config.json of a checkpoint, read into one frozen description of a decoder.

Both layouts in the wild are understood: flat `rope_theta` + `rope_scaling`, and the newer `rope_parameters`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import EXIT_INIT, StartupError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding and its context extension. Fields of other kinds keep their defaults."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from the factor
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder of the Llama family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: RopeConfig


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; StartupError names the file when it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}", EXIT_INIT) from None
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}", EXIT_INIT) from None
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object", EXIT_INIT)
    return value


def eos_token_ids(weight_path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text. generation_config.json wins: only there do fine-tuned models list turn markers."""
    generation_file = weight_path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def parse_decoder(
    config: Mapping[str, Any], *, qkv_bias: bool, output_bias: bool, mlp_bias: bool
) -> DecoderConfig:
    """Check what this build can compute; every refusal names the key and the value found."""
    if config.get("hidden_act", "silu") != "silu":
        raise _refusal(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise _refusal(f"quantization_config (quant_method {method!r}) is not supported")
    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise _refusal(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise _refusal(f"head_dim {head_dim} is odd: rotary embedding needs pairs")
    max_positions = _positive(config, "max_position_embeddings")
    return DecoderConfig(
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        rope=parse_rope(config, max_positions),
    )


def parse_rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise _refusal(f"rope type {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refusal("partial_rotary_factor other than 1.0 is not supported")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(kind, theta)
    # outside the rope object it is the pre-training length as well, and then it has the last word
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = int(original or max_positions)
    factor = rope.get("factor")
    if factor is None:
        if kind != "yarn":
            raise _refusal(f"rope type {kind!r} needs a factor")
        factor = max_positions / original
    return RopeConfig(
        kind,
        theta,
        factor=float(factor),
        original_max_positions=original,
        low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
        high_freq_factor=float(rope.get("high_freq_factor") or 4.0),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=rope.get("attention_factor"),
        mscale=float(rope.get("mscale") or 0.0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        truncate=bool(rope.get("truncate", True)),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise _refusal(f"{key} must be a positive integer, found {value!r}")
    return value


def _refusal(reason: str) -> StartupError:
    return StartupError(f"model config.json: {reason}", EXIT_INIT)
