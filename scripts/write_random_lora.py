#!/usr/bin/env python3
"""Write a LoRA adapter with random weights for a model: to try the server's adapters without training one.

    python scripts/write_random_lora.py --model models/mindie-tiny --out /tmp/lora-a --rank 8

What comes out loads like an adapter saved by PEFT. It changes what the model says, not for the better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# The server warns of a directory that is wider.
DIRECTORY_MODE = 0o750
FILE_MODE = 0o640


def projection_shapes(config: Mapping[str, Any], targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of the projections, in every layer. `config`: the model's config.json."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    query, key_value = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    shapes = {
        "q_proj": ("self_attn", query, hidden),
        "k_proj": ("self_attn", key_value, hidden),
        "v_proj": ("self_attn", key_value, hidden),
        "o_proj": ("self_attn", hidden, query),
        "gate_proj": ("mlp", inner, hidden),
        "up_proj": ("mlp", inner, hidden),
        "down_proj": ("mlp", hidden, inner),
    }
    return {
        f"model.layers.{layer}.{block}.{target}": (rows, columns)
        for layer in range(config["num_hidden_layers"])
        for target, (block, rows, columns) in shapes.items()
        if target in targets
    }


def tensors(
    shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float, strength: float, seed: int
) -> dict[str, Tensor]:
    """Every tensor under the name PEFT gives it.

    `strength`: the standard deviation of what is added to each weight, as a multiple of in**-0.5, about that
    of a fresh weight.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for module, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator) * strength * rank**0.5 / alpha
        named[f"base_model.model.{module}.lora_A.weight"] = a
        named[f"base_model.model.{module}.lora_B.weight"] = b
    return named


def write_adapter(
    model: Path,
    out: Path,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    strength: float = 1.0,
    seed: int = 0,
    targets: Sequence[str] = TARGETS,
) -> int:
    """Write the whole directory; the number of parameters. Existing files of these names are replaced."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    weights = tensors(projection_shapes(config, targets), rank, alpha, strength, seed)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(DIRECTORY_MODE)
    (out / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    save_file(weights, str(out / WEIGHTS_FILE), metadata={"format": "pt"})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (out / name).chmod(FILE_MODE)
    return sum(tensor.numel() for tensor in weights.values())


def main(argv: Sequence[str] | None = None) -> int:
    """0 when written, 1 when something is in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the model directory it is for")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's directory")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--strength", type=float, default=1.0, help="1: weights change by their own size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="PROJECTION")
    parser.add_argument("--force", action="store_true", help="replace an adapter that is there already")
    args = parser.parse_args(argv)
    if (args.out / CONFIG_FILE).exists() and not args.force:
        print(f"{args.out} holds an adapter already; --force replaces it", file=sys.stderr)
        return 1
    try:
        parameters = write_adapter(
            args.model,
            args.out,
            rank=args.rank,
            alpha=args.alpha,
            strength=args.strength,
            seed=args.seed,
            targets=args.targets,
        )
    except (OSError, ValueError, KeyError) as error:
        print(f"{args.model}: is no model this script knows: {error!r}", file=sys.stderr)
        return 1
    print(f"{args.out}: rank {args.rank}, {parameters / 1e6:.2f} M random parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
