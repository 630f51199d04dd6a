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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# The server refuses a model directory that is wider.
DIRECTORY_MODE = 0o750
FILE_MODE = 0o640


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama or Qwen2 decoder."""

    family: str  # "llama" or "qwen2"; the latter has biases on queries, keys and values
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

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, True, 1e6, 1e-6, 32768),
    "smollm2-135m": Shape("llama", 30, 576, 9, 3, 1536, 49152, True, 1e5),
    # next to nothing to compute: what is left is what the server itself costs
    "tiny64": Shape("qwen2", 2, 64, 4, 2, 256, 2048, True),
    "llama-tiny": Shape("llama", 3, 96, 6, 3, 256, 2048, False),
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

    hidden, query, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fan_in = hidden**-0.5
    yield "model.embed_tokens.weight", table()
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        projections = {"q": (query, QUERY_KEY_GAIN), "k": (kv, QUERY_KEY_GAIN), "v": (kv, 1.0)}
        for name, (rows, gain) in projections.items():
            yield f"{at}.self_attn.{name}_proj.weight", normal(gain * fan_in, rows, hidden)
            if shape.family == "qwen2":
                yield f"{at}.self_attn.{name}_proj.bias", normal(BIAS_STD, rows)
        yield f"{at}.self_attn.o_proj.weight", normal(ATTENTION_GAIN * query**-0.5, hidden, query)
        yield f"{at}.mlp.gate_proj.weight", normal(fan_in, shape.intermediate, hidden)
        yield f"{at}.mlp.up_proj.weight", normal(fan_in, shape.intermediate, hidden)
        yield f"{at}.mlp.down_proj.weight", normal(shape.intermediate**-0.5, hidden, shape.intermediate)
        yield f"{at}.input_layernorm.weight", torch.ones(hidden, dtype=dtype)
        yield f"{at}.post_attention_layernorm.weight", torch.ones(hidden, dtype=dtype)
    yield "model.norm.weight", torch.ones(hidden, dtype=dtype)
    if not shape.tied:
        yield "lm_head.weight", table()


def model_config(shape: Shape, dtype: str) -> dict[str, Any]:
    """config.json."""
    specific: dict[str, Any] = (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
        if shape.family == "qwen2"
        else {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}
    )
    return specific | {
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


# --- tokenizer -------------------------------------------------------------------------------------------

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIRST_WORD = len(SPECIAL_TOKENS) + 256
SPACE = "Ġ"  # how byte-level vocabularies write a space

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves, the others for the letters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def word(number: int) -> str:
    """A word of three syllables, another one for each number below 343,000."""
    base = len(SYLLABLES)
    return SYLLABLES[number % base] + SYLLABLES[number // base % base] + SYLLABLES[number // base**2]


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer with exactly `vocab_size` ids: special tokens, bytes, then words with a space.

    It has no merges: a known word is one token, anything else is spelled out in bytes.
    """
    if not FIRST_WORD < vocab_size <= FIRST_WORD + len(SYLLABLES) ** 3:
        raise ValueError(f"no tokenizer of {vocab_size} ids")
    words = (SPACE + word(number) for number in range(vocab_size - FIRST_WORD))
    names = [*SPECIAL_TOKENS, *byte_letters(), *words]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for index, name in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [],
        },
    }  # fmt: skip


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
