"""config.json and generation_config.json of a checkpoint, read into one frozen description of a decoder.

Both layouts in the wild are understood: flat `rope_theta` + `rope_scaling`, and the newer `rope_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from worker.config_values import MAX_INT, ConfigValues, shown

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")

_MIN_THETA = 2.0  # far below any in use; at 1 its logarithm, which YaRN divides by, is 0
MAX_LAYERS = 10_000  # tensors are listed by name before anything is loaded


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
class ExpertsConfig:
    """Which experts a token goes to, and how much each of them counts."""

    num_experts: int
    per_token: int
    intermediate_size: int  # of one expert
    dense_layers: frozenset[int] = frozenset()  # layers with a plain MLP instead
    shared_intermediate_size: int = 0  # of the experts that every token goes to, side by side; 0: none
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    has_correction: bool = False  # a bias on the scores that decides who is chosen, and nothing else
    normalise: bool = True  # the chosen scores are divided by their sum
    scale: float = 1.0  # on the chosen scores
    num_groups: int = 1
    groups_per_token: int = 1  # all experts of a token are in so many groups
    scores_of_group: int = 1  # the best so many scores of a group, added up, decide whether it is chosen
    exact: bool = False  # scores are computed in float32 whatever the dtype


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Attention whose keys and values are made of one short vector for each token."""

    q_rank: int | None  # None: queries are made directly
    kv_rank: int
    plain_dim: int  # of each head of queries and keys: what is not rotated, ...
    rotary_dim: int  # ... and what is, one for the keys of all heads
    value_dim: int
    interleaved: bool  # rotated pairs are neighbours
    scale: float  # of the scores


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder of the Llama family.

    num_kv_heads and head_dim are those of what is cached: with `latent` one head of kv_rank + rotary_dim.
    """

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
    qk_norm: bool = False  # each query and key head is normalised before it is rotated
    window: int | None = None  # latest tokens a token attends to, itself among them; None: all
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    num_extra_layers: int = 0  # behind the others, for guessing ahead; not loaded

    @property
    def rotary_dim(self) -> int:
        """Of each head, what is rotated."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim

    @property
    def shares_pages(self) -> bool:
        """Whether values are read from the pages of the keys."""
        return self.latent is not None

    @property
    def usable_positions(self) -> int:
        """Longest text the model is made for.

        Some checkpoints give the length after the extension as max_position_embeddings, some the one before.
        """
        if self.rope.kind not in ("llama3", "yarn"):
            return self.max_position_embeddings
        extended = min(self.rope.original_max_positions * self.rope.factor, MAX_INT)
        return max(self.max_position_embeddings, int(extended))


def eos_token_ids(weight_path: Path, config: ConfigValues) -> tuple[int, ...]:
    """Ids that end a text. generation_config.json wins: only there do fine-tuned models list turn markers."""
    generation_file = weight_path / "generation_config.json"
    sources = [ConfigValues.read(generation_file)] if generation_file.exists() else []
    for source in (*sources, config):
        value = source.raw("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item <= MAX_INT for item in ids):
            raise source.wrong("eos_token_id", "a token id or a list of them")
        return tuple(ids)
    return ()


def parse_decoder(
    config: ConfigValues, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool
) -> DecoderConfig:
    """Check what this build can compute; every refusal names the key and the value found."""
    if config.text("hidden_act", "silu") != "silu":
        raise config.wrong("hidden_act", '"silu"')
    if config.raw("quantization_config"):
        found = shown(config.raw("quantization_config"))
        raise config.refusal(
            f"quantization_config {found}: not supported; quantised weights are read with"
            ' "quantize" and a quant_model_description.json'
        )
    hidden_size = config.positive("hidden_size")
    num_heads = config.positive("num_attention_heads")
    num_kv_heads = config.optional_positive("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}")
    head_dim = config.optional_positive("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise config.wrong(
                "hidden_size", f"a multiple of num_attention_heads {num_heads}, as no head_dim is given"
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise config.refusal(f"head_dim {head_dim} is odd, but rotary embedding needs pairs")
    max_positions = config.positive("max_position_embeddings")
    return DecoderConfig(
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive("intermediate_size"),
        num_layers=config.positive("num_hidden_layers", most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6, least=0.0),
        max_position_embeddings=max_positions,
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        rope=parse_rope(config, max_positions),
    )


def parse_rope(config: ConfigValues, max_positions: int) -> RopeConfig:
    rope = config.section("rope_parameters")
    if not rope.names():
        rope = config.section("rope_scaling")
    for key in rope.names():
        if isinstance(rope.raw(key), dict):
            raise rope.wrong(key, "a plain value: rotary embeddings that differ by layer are not supported")
    kind_key = "rope_type" if rope.raw("rope_type") is not None else "type"
    kind = rope.text(kind_key, "default")
    if kind not in ROPE_KINDS:
        raise rope.wrong(kind_key, f"one of {', '.join(ROPE_KINDS)}")
    for source in (rope, config):
        if source.optional_number("partial_rotary_factor", least=0.0) not in (None, 1.0):
            raise source.wrong("partial_rotary_factor", "1.0; no other value is supported")
    theta = 10000.0
    for source in (config, rope):
        theta = source.optional_number("rope_theta", least=_MIN_THETA) or theta
    if kind == "default":
        return RopeConfig("default", theta)
    # outside the rope object it is the pre-training length as well, and then it has the last word
    key = "original_max_position_embeddings"
    source = rope if config.raw(key) is None else config
    original = source.optional_positive(key) or max_positions
    factor = rope.optional_number("factor", least=1.0)
    if factor is None:
        if kind != "yarn":
            raise rope.wrong("factor", f"given for rope type {kind!r}, a number >= 1")
        if original > max_positions:
            raise source.wrong(key, f"at most max_position_embeddings {max_positions}, as no factor is given")
        factor = max_positions / original
    low = rope.optional_number("low_freq_factor", least=0.0) or 1.0
    high = rope.optional_number("high_freq_factor", least=0.0) or 4.0
    if low >= high:
        raise rope.wrong("low_freq_factor", f"below high_freq_factor {high:g}")
    return RopeConfig(
        cast(RopeKind, kind),
        theta,
        factor=factor,
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=rope.optional_number("beta_fast", least=0.0) or 32.0,
        beta_slow=rope.optional_number("beta_slow", least=0.0) or 1.0,
        attention_factor=rope.optional_number("attention_factor", least=0.0),
        mscale=rope.optional_number("mscale", least=0.0) or 0.0,
        mscale_all_dim=rope.optional_number("mscale_all_dim", least=0.0) or 0.0,
        truncate=rope.flag("truncate", True),
    )
