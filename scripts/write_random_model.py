#!/usr/bin/env python3
"""Write a checkpoint with random weights: a model of the right size, for measuring only.

    python scripts/write_random_model.py --shape qwen2.5-0.5b --out /tmp/random-0.5b

What comes out loads like any downloaded checkpoint (config.json, safetensors, tokenizer). Two things are made
so that measuring works: greedy decoding keeps moving instead of repeating one token for ever, and every token
it chooses is a whole, distinct, printable word, so that each step has text to send.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages beside this folder
from scripts.random_tokenizer import CHAT_TEMPLATE, END_OF_TEXT, FIRST_WORD, SPECIAL_TOKENS, tokenizer_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# The server refuses a model directory that is wider.
DIRECTORY_MODE = 0o750
FILE_MODE = 0o640


@dataclass(frozen=True, slots=True)
class Experts:
    """In place of the MLP, but for the first `dense` layers."""

    number: int
    per_token: int
    intermediate: int
    dense: int = 0
    shared: int = 0
    groups: int = 1
    groups_per_token: int = 1


@dataclass(frozen=True, slots=True)
class Latent:
    """In place of keys and values."""

    q_rank: int | None
    kv_rank: int
    plain: int
    rotary: int
    value: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder."""

    family: str  # of FAMILIES
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    rope_theta: float = 10000.0
    eps: float = 1e-5
    positions: int = 8192
    head_size: int | None = None  # None: hidden / heads
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads


# family -> its entries of config.json that are no sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "use_sliding_window": False,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True,
    },
}  # fmt: skip

_SMALL_EXPERTS = Experts(8, 2, 96)
_SMALL_LATENT = Latent(48, 32, 16, 16, 16)
_DEEP_EXPERTS = Experts(8, 2, 96, dense=1, shared=1, groups=4, groups_per_token=2)

SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, True, 1e6, 1e-6, 32768),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 28, 4, 18944, 152064, False, 1e6, 1e-6, 32768),
    "smollm2-135m": Shape("llama", 30, 576, 9, 3, 1536, 49152, True, 1e5),
    # next to nothing to compute: what is left is what the server itself costs
    "tiny64": Shape("qwen2", 2, 64, 4, 2, 256, 2048, True),
    "llama-tiny": Shape("llama", 3, 96, 6, 3, 256, 2048, False),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 3072, 151936, True, 1e6, 1e-6, 40960, head_size=128),
    "mistral-tiny": Shape("mistral", 3, 96, 6, 3, 256, 2048, False),
    "qwen3-tiny": Shape("qwen3", 3, 96, 6, 3, 256, 2048, True, eps=1e-6, head_size=32),
    "mixtral-tiny": Shape("mixtral", 3, 96, 6, 3, 128, 2048, False, experts=Experts(8, 2, 128)),
    "qwen3-moe-tiny": Shape(
        "qwen3_moe", 3, 96, 6, 3, 256, 2048, False, eps=1e-6, head_size=32, experts=_SMALL_EXPERTS
    ),
    "deepseek-v2-tiny": Shape(
        "deepseek_v2",
        3,
        96,
        6,
        6,
        256,
        2048,
        False,
        eps=1e-6,
        experts=_DEEP_EXPERTS,
        latent=Latent(None, 32, 16, 16, 16),
    ),
    "deepseek-v3-tiny": Shape(
        "deepseek_v3", 3, 96, 6, 6, 256, 2048, False, eps=1e-6, experts=_DEEP_EXPERTS, latent=_SMALL_LATENT
    ),
}

# --- weights ---------------------------------------------------------------------------------------------

# A tied head compares the last hidden state with every embedding; as long as the embedding of the token just
# read is a large part of that state, the answer is this token again. So embeddings start small and each layer
# adds some ten times as much.
EMBEDDING_STD = 0.02
REPEATING_STD = 100 * EMBEDDING_STD  # --repeating: they are nearly all of that state
BIAS_STD = 0.1
# Peaked attention scores: a flat average over the context would be nearly the same at every step.
QUERY_KEY_GAIN = 2.0
# Next to the embeddings, not above them: what the first layers pass on must still depend on the newest token.
ATTENTION_GAIN = 0.05
# Rows of tokens that are no whole word (special tokens, single bytes) never win the comparison.
UNWANTED_GAIN = 0.1


def tensors(
    shape: Shape, seed: int, dtype: torch.dtype, embedding_std: float = EMBEDDING_STD
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint under its published name, in a fixed order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(std: float, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(0.0, std, generator=generator)

    def table() -> Tensor:
        rows = normal(embedding_std, shape.vocab, shape.hidden)
        rows[:FIRST_WORD] *= UNWANTED_GAIN
        return rows

    hidden = shape.hidden
    yield "model.embed_tokens.weight", table()
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        parts = (
            _attention(shape, f"{at}.self_attn", normal),
            _mlps(shape, at, layer, normal),
        )
        for part in parts:
            yield from part
        yield f"{at}.input_layernorm.weight", torch.ones(hidden, dtype=dtype)
        yield f"{at}.post_attention_layernorm.weight", torch.ones(hidden, dtype=dtype)
    yield "model.norm.weight", torch.ones(hidden, dtype=dtype)
    if not shape.tied:
        yield "lm_head.weight", table()


Normal = Callable[..., Tensor]  # (std, *size) -> random numbers


def _attention(shape: Shape, at: str, normal: Normal) -> Iterator[tuple[str, Tensor]]:
    hidden, query, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fan_in = hidden**-0.5
    if shape.latent is not None:
        yield from _latent_attention(shape, shape.latent, at, normal)
        return
    projections = {"q": (query, QUERY_KEY_GAIN), "k": (kv, QUERY_KEY_GAIN), "v": (kv, 1.0)}
    for name, (rows, gain) in projections.items():
        yield f"{at}.{name}_proj.weight", normal(gain * fan_in, rows, hidden)
        if shape.family == "qwen2":
            yield f"{at}.{name}_proj.bias", normal(BIAS_STD, rows)
    yield f"{at}.o_proj.weight", normal(ATTENTION_GAIN * query**-0.5, hidden, query)
    if shape.family in ("qwen3", "qwen3_moe"):
        for name in ("q_norm", "k_norm"):
            yield f"{at}.{name}.weight", torch.full_like(normal(1.0, shape.head_dim), QUERY_KEY_GAIN)


def _latent_attention(shape: Shape, latent: Latent, at: str, normal: Normal) -> Iterator[tuple[str, Tensor]]:
    hidden, heads = shape.hidden, shape.heads
    query, values = heads * (latent.plain + latent.rotary), heads * latent.value
    if latent.q_rank is None:
        yield f"{at}.q_proj.weight", normal(QUERY_KEY_GAIN * hidden**-0.5, query, hidden)
    else:
        yield f"{at}.q_a_proj.weight", normal(hidden**-0.5, latent.q_rank, hidden)
        yield f"{at}.q_a_layernorm.weight", torch.ones_like(normal(1.0, latent.q_rank))
        yield f"{at}.q_b_proj.weight", normal(QUERY_KEY_GAIN * latent.q_rank**-0.5, query, latent.q_rank)
    yield (
        f"{at}.kv_a_proj_with_mqa.weight",
        normal(hidden**-0.5, latent.kv_rank + latent.rotary, hidden),
    )
    yield f"{at}.kv_a_layernorm.weight", torch.ones_like(normal(1.0, latent.kv_rank))
    rows = heads * (latent.plain + latent.value)
    yield f"{at}.kv_b_proj.weight", normal(QUERY_KEY_GAIN * latent.kv_rank**-0.5, rows, latent.kv_rank)
    yield f"{at}.o_proj.weight", normal(ATTENTION_GAIN * values**-0.5, hidden, values)


def _mlps(shape: Shape, at: str, layer: int, normal: Normal) -> Iterator[tuple[str, Tensor]]:
    """The MLP of a layer, or its router and experts."""
    names = ("gate_proj", "up_proj", "down_proj")
    experts = shape.experts
    if experts is None or layer < experts.dense:
        yield from _gated_mlp(f"{at}.mlp", names, shape.hidden, shape.intermediate, normal)
        return
    block = "block_sparse_moe" if shape.family == "mixtral" else "mlp"
    yield f"{at}.{block}.gate.weight", normal(shape.hidden**-0.5, experts.number, shape.hidden)
    if shape.family == "deepseek_v3":
        correction = normal(BIAS_STD, experts.number).float()
        yield f"{at}.{block}.gate.e_score_correction_bias", correction
    for number in range(experts.number):
        of_expert = ("w1", "w3", "w2") if shape.family == "mixtral" else names
        place = f"{at}.{block}.experts.{number}"
        yield from _gated_mlp(place, of_expert, shape.hidden, experts.intermediate, normal)
    if experts.shared:
        inner = experts.shared * experts.intermediate
        yield from _gated_mlp(f"{at}.{block}.shared_experts", names, shape.hidden, inner, normal)


def _gated_mlp(
    at: str, names: Sequence[str], hidden: int, inner: int, normal: Normal
) -> Iterator[tuple[str, Tensor]]:
    gate, up, down = names
    yield f"{at}.{gate}.weight", normal(hidden**-0.5, inner, hidden)
    yield f"{at}.{up}.weight", normal(hidden**-0.5, inner, hidden)
    yield f"{at}.{down}.weight", normal(inner**-0.5, hidden, inner)


def model_config(shape: Shape, dtype: str) -> dict[str, Any]:
    """config.json."""
    return (
        FAMILIES[shape.family]
        | _special_sizes(shape)
        | {
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": shape.positions,
            "rms_norm_eps": shape.eps,
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": shape.tied,
            "vocab_size": shape.vocab,
            "bos_token_id": None,
            "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
            "torch_dtype": dtype,
        }
    )


def _special_sizes(shape: Shape) -> dict[str, Any]:
    """Of heads, experts and latent vectors, where a family has them."""
    sizes: dict[str, Any] = {"head_dim": shape.head_size} if shape.head_size else {}
    if (experts := shape.experts) is not None:
        number = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
        sizes |= {
            number.get(shape.family, "n_routed_experts"): experts.number,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.intermediate,
        }
        if shape.family.startswith("deepseek"):
            sizes |= {
                "n_shared_experts": experts.shared,
                "first_k_dense_replace": experts.dense,
                "n_group": experts.groups,
                "topk_group": experts.groups_per_token,
                "routed_scaling_factor": 1.0,
            }
    if (latent := shape.latent) is not None:
        sizes |= {
            "q_lora_rank": latent.q_rank,
            "kv_lora_rank": latent.kv_rank,
            "qk_nope_head_dim": latent.plain,
            "qk_rope_head_dim": latent.rotary,
            "v_head_dim": latent.value,
        }
    return sizes


# --- writing ---------------------------------------------------------------------------------------------


def write_model(
    shape: Shape, out: Path, seed: int = 0, dtype: str = "bfloat16", *, repeating: bool = False
) -> int:
    """Write the whole directory; the number of parameters. Existing files of these names are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(DIRECTORY_MODE)
    weights = dict(tensors(shape, seed, DTYPES[dtype], REPEATING_STD if repeating else EMBEDDING_STD))
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    end = SPECIAL_TOKENS.index(END_OF_TEXT)
    documents: dict[str, dict[str, Any]] = {
        "config.json": model_config(shape, dtype),
        "generation_config.json": {"do_sample": False, "eos_token_id": end, "pad_token_id": end},
        "tokenizer.json": tokenizer_json(shape.vocab),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": shape.positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, document in documents.items():
        # the vocabulary has a line per token otherwise
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    for name in (*documents, "model.safetensors"):
        (out / name).chmod(FILE_MODE)
    return sum(tensor.numel() for tensor in weights.values())


def main(argv: Sequence[str] | None = None) -> int:
    """0 when written, 1 when something is in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the model directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--repeating", action="store_true", help="a model with a tied head that says its last token for ever"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that is there already")
    args = parser.parse_args(argv)
    if (args.out / "config.json").exists() and not args.force:
        print(f"{args.out} holds a model already; --force replaces it", file=sys.stderr)
        return 1
    if args.repeating and not SHAPES[args.shape].tied:
        parser.error(
            f"--repeating: {args.shape} has no tied head; tied are "
            + ", ".join(name for name, shape in SHAPES.items() if shape.tied)
        )
    parameters = write_model(SHAPES[args.shape], args.out, args.seed, args.dtype, repeating=args.repeating)
    print(f"{args.out}: {args.shape}, {parameters / 1e6:.1f} M random parameters in {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
