"""What the config.json of each family means. Without torch, so that a configuration can be checked fast."""

from __future__ import annotations

from dataclasses import replace

from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig, parse_decoder

_MISTRAL_WINDOW = 4096  # of a config.json that says nothing; later models say null


def parse_llama(config: ConfigValues) -> DecoderConfig:
    attention_bias = config.flag("attention_bias")
    return parse_decoder(
        config,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias"),
    )


def parse_mistral(config: ConfigValues) -> DecoderConfig:
    decoder = parse_decoder(config, qkv_bias=False, output_bias=False, mlp_bias=False)
    says_nothing = "sliding_window" not in config.names()
    return replace(
        decoder, window=_MISTRAL_WINDOW if says_nothing else config.optional_positive("sliding_window")
    )


def parse_qwen2(config: ConfigValues) -> DecoderConfig:
    _refuse_mixed_windows(config)
    return parse_decoder(config, qkv_bias=True, output_bias=False, mlp_bias=False)


def parse_qwen3(config: ConfigValues) -> DecoderConfig:
    _refuse_mixed_windows(config)
    bias = config.flag("attention_bias")
    return replace(parse_decoder(config, qkv_bias=bias, output_bias=bias, mlp_bias=False), qk_norm=True)


def _refuse_mixed_windows(config: ConfigValues) -> None:
    """Qwen's windows begin at a layer in the middle."""
    if config.flag("use_sliding_window"):
        raise config.wrong("use_sliding_window", "false; windows of some layers only are not supported")
