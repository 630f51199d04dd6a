"""What the config.json of each family means. Without torch, so that a configuration can be checked fast."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from worker.config_values import MAX_INT, ConfigValues
from worker.hf_config import (
    MAX_LAYERS,
    DecoderConfig,
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
    parse_decoder,
)

_MAX_EXPERTS = 4096  # tensors are listed by name before anything is loaded
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


def parse_mixtral(config: ConfigValues) -> DecoderConfig:
    decoder = parse_decoder(config, qkv_bias=False, output_bias=False, mlp_bias=False)
    num_experts = _num_experts(config, "num_local_experts")
    experts = ExpertsConfig(
        num_experts=num_experts,
        per_token=_per_token(config, num_experts),
        intermediate_size=decoder.intermediate_size,
    )
    return replace(decoder, window=config.optional_positive("sliding_window"), experts=experts)


def parse_qwen3_moe(config: ConfigValues) -> DecoderConfig:
    decoder = parse_qwen3(config)
    step = config.optional_positive("decoder_sparse_step") or 1
    dense = {index for index in range(decoder.num_layers) if (index + 1) % step}
    num_experts = _num_experts(config, "num_experts", "num_local_experts")
    experts = ExpertsConfig(
        num_experts=num_experts,
        per_token=_per_token(config, num_experts),
        intermediate_size=config.positive("moe_intermediate_size"),
        dense_layers=frozenset({*config.numbers("mlp_only_layers"), *dense}),
        normalise=config.flag("norm_topk_prob"),
    )
    return replace(decoder, experts=experts)


def _num_experts(config: ConfigValues, *names: str) -> int:
    """Under the first name there is: transformers writes another one than it once read."""
    there = [name for name in names if config.raw(name) is not None]
    return config.positive((there or names)[0], most=_MAX_EXPERTS)


def _per_token(config: ConfigValues, num_experts: int) -> int:
    return config.positive("num_experts_per_tok", most=num_experts)


def parse_deepseek_v2(config: ConfigValues) -> DecoderConfig:
    """Softmax over the experts; of the best groups, if they are limited, the best expert counts."""
    _refuse_other(config, "scoring_func", "softmax")
    if config.flag("norm_topk_prob"):
        raise config.wrong("norm_topk_prob", "false; no model of this architecture has it otherwise")
    method = config.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise config.wrong("topk_method", '"greedy" or "group_limited_greedy"')
    limited = method == "group_limited_greedy"
    return _parse_deepseek(config, limited=limited, scores_of_group=1, scoring="softmax", normalise=False)


def parse_deepseek_v3(config: ConfigValues) -> DecoderConfig:
    """Sigmoids, corrected by a bias where experts are chosen; of a group the best two count."""
    _refuse_other(config, "scoring_func", "sigmoid")
    _refuse_other(config, "topk_method", "noaux_tc")
    normalise = config.flag("norm_topk_prob", True)
    return _parse_deepseek(config, limited=True, scores_of_group=2, scoring="sigmoid", normalise=normalise)


def _refuse_other(config: ConfigValues, key: str, only: str) -> None:
    if config.text(key, only) != only:
        raise config.wrong(key, f'"{only}"')


def _parse_deepseek(
    config: ConfigValues,
    *,
    limited: bool,
    scores_of_group: int,
    scoring: Literal["softmax", "sigmoid"],
    normalise: bool,
) -> DecoderConfig:
    bias = config.flag("attention_bias")
    decoder = parse_decoder(config, qkv_bias=bias, output_bias=bias, mlp_bias=False)
    if config.flag("mlp_bias"):
        raise config.wrong("mlp_bias", "false")
    num_experts = _num_experts(config, "n_routed_experts", "num_experts", "num_local_experts")
    groups = config.optional_positive("n_group") if limited else None
    if num_experts % (groups or 1) or num_experts // (groups or 1) < scores_of_group:
        raise config.wrong(
            "n_group", f"a divisor of n_routed_experts {num_experts} with {scores_of_group} or more in each"
        )
    of_groups = config.positive("topk_group", most=groups) if groups else 1
    if (config.optional_positive("moe_layer_freq") or 1) != 1:
        raise config.wrong("moe_layer_freq", "1")
    inner, shared = config.positive("moe_intermediate_size"), config.whole("n_shared_experts")
    experts = ExpertsConfig(
        num_experts=num_experts,
        per_token=_per_token(config, num_experts // (groups or 1) * of_groups),
        intermediate_size=inner,
        dense_layers=frozenset(range(min(config.whole("first_k_dense_replace"), decoder.num_layers))),
        shared_intermediate_size=inner * shared,
        scoring=scoring,
        has_correction=scoring == "sigmoid",
        normalise=normalise,
        scale=config.number("routed_scaling_factor", 1.0, least=0.0),
        num_groups=groups or 1,
        groups_per_token=of_groups,
        scores_of_group=scores_of_group,
        exact=True,
    )
    latent = _parse_latent(config, decoder)
    return replace(
        decoder,
        num_kv_heads=1,
        head_dim=latent.kv_rank + latent.rotary_dim,
        experts=experts,
        latent=latent,
        num_extra_layers=config.whole("num_nextn_predict_layers") or config.whole("num_mtp_layers"),
    )


def _parse_latent(config: ConfigValues, decoder: DecoderConfig) -> LatentConfig:
    plain, rotary = config.positive("qk_nope_head_dim"), config.positive("qk_rope_head_dim")
    if rotary % 2:
        raise config.wrong("qk_rope_head_dim", "even, as rotary embedding needs pairs")
    scale = (plain + rotary) ** -0.5
    rope = decoder.rope
    if rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    return LatentConfig(
        q_rank=config.optional_positive("q_lora_rank"),
        kv_rank=config.positive("kv_lora_rank"),
        plain_dim=plain,
        rotary_dim=rotary,
        value_dim=config.positive("v_head_dim"),
        interleaved=config.flag("rope_interleave", True),
        scale=scale,
    )


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
