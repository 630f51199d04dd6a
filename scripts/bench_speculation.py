#!/usr/bin/env python3
"""What speculative decoding gains on a text that repeats itself, and what it costs on one that does not.

    python scripts/write_random_model.py --shape qwen2.5-0.5b --repeating --out .bench/repeating
    python scripts/write_random_model.py --shape qwen2.5-0.5b --out .bench/qwen2.5-0.5b
    python scripts/bench_speculation.py --repeating .bench/repeating --other .bench/qwen2.5-0.5b

Two daemons of our own per model, with and without the plugin, answer the same prompts in turn: greedy, one
stream and more. A random model that says its last token for ever stands for an answer that can be looked up,
one that never says the same again for any other. Medians of the rounds, and the ratio of each.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_peers import Workload, noisy, our_column, rounds
from bench_serving import MAX_OTHER_CORES, environment, positive_int, positive_ints

PLUGIN = {"plugin_type": "memory_decoding", "decoding_length": 16, "dynamic_algo": True}
INPUT, OUTPUT = 256, 128


def measure(model: Path, streams: Sequence[int], repeats: int, seed: int) -> dict[int, dict[str, Any]]:
    """Per number of streams the figures without and with the plugin."""
    longest = INPUT + OUTPUT + 1
    with contextlib.ExitStack() as stack:
        columns = [
            stack.enter_context(our_column(name, model, longest, max(streams), seed, plugin))
            for name, plugin in (("without", None), ("with", PLUGIN))
        ]
        return {
            count: rounds(columns, Workload(f"c{count}", count, INPUT, OUTPUT, 2 * count), repeats)
            for count in streams
        }


def table(text: str, figures: dict[int, dict[str, Any]]) -> list[str]:
    lines = []
    for count, columns in figures.items():
        without, speculative = (columns[name]["median"]["output_tok_s"] for name in ("without", "with"))
        ratio = speculative / without
        lines.append(f"| {text} | {count} | {without:,.1f} | {speculative:,.1f} | {ratio:.2f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when nothing could be measured."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeating", type=Path, required=True, help="a model that repeats itself")
    parser.add_argument("--other", type=Path, required=True, help="one that does not")
    parser.add_argument("--streams", type=positive_ints, default=[1, 8])
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    args = parser.parse_args(argv)
    try:
        results = {
            text: measure(model, args.streams, args.repeats, args.seed)
            for text, model in (("repeats itself", args.repeating), ("never repeats", args.other))
        }
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        print(f"cannot measure: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for name, value in environment(str(args.other), argv).items():
        print(f"{name:<10}{value}")
    print("\n| answer | streams | tok/s without | with | ratio |\n|---|---|---|---|---|")
    for text, figures in results.items():
        print("\n".join(table(text, figures)))
    if any(noisy({str(count): row for count, row in figures.items()}) for figures in results.values()):
        print(f"\nother processes used more than {MAX_OTHER_CORES} core: do not judge by these figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
