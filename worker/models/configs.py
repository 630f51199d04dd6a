"""What the config.json of each family means. Without torch, so that a configuration can be checked fast."""

from __future__ import annotations

from dataclasses import replace

from worker.config_values import MAX_INT, ConfigValues
from worker.hf_config import MAX_LAYERS, DecoderConfig, RopeConfig, parse_decoder

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


# what the same size is called by architectures that transformers knows
_SIZES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
    "positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}


def parse_generic(config: ConfigValues) -> DecoderConfig:
    """Sizes only: the arithmetic is transformers'. What must be no decoder of plain attention is refused."""
    if config.flag("is_encoder_decoder"):
        raise config.wrong("is_encoder_decoder", "false; models with an encoder are not served")
    if config.raw("text_config") is not None:
        raise config.refusal("text_config: models of several parts (text and images) are not served")
    if config.raw("quantization_config"):
        raise config.refusal("quantization_config is not supported")
    kinds = {*config.texts("layer_types")} - {"full_attention"}
    if kinds - {"sliding_attention"}:
        raise config.wrong("layer_types", "full_attention or sliding_attention in every layer")
    windows = config.flag("use_sliding_window", True) and (
        config.raw("layer_types") is None or "sliding_attention" in kinds
    )
    hidden, heads = _size(config, "hidden"), _size(config, "heads")
    kv_heads = config.optional_positive("num_key_value_heads") or (1 if config.flag("multi_query") else heads)
    return DecoderConfig(
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(config, "inner", 4 * hidden),
        num_layers=_size(config, "layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.optional_positive("head_dim") or max(1, hidden // heads),
        rms_norm_eps=0.0,
        max_position_embeddings=_size(config, "positions"),
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        rope=RopeConfig("default", 10000.0),
        window=config.optional_positive("sliding_window") if windows else None,
    )


def _size(config: ConfigValues, what: str, default: int | None = None) -> int:
    """Of the first name there is."""
    names = _SIZES[what]
    for name in names:
        if config.raw(name) is not None:
            return config.positive(name, most=MAX_LAYERS if what == "layers" else MAX_INT)
    if default is not None:
        return default
    raise config.refusal(f"none of {', '.join(names)} is there: no decoder of plain attention")
