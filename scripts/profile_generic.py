#!/usr/bin/env python3
"""What a family of its own is worth: a checkpoint through its family, and through transformers' modules.

    python scripts/write_random_model.py --shape qwen2.5-0.5b --out /tmp/random-0.5b
    python scripts/profile_generic.py --model /tmp/random-0.5b --batch 1,8,32 --context 256 --prefill 256

The model is loaded twice and both run the same steps in turn; the fastest of each kind counts, as other work
on the machine only ever adds. Tokens per second are those of the forward pass alone. With --threads 1 times
are of the processor, else of the clock.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages beside this folder

from worker.environment import prepare_environment

prepare_environment()  # as the daemon does, before torch is loaded

import torch

from engine.errors import StartupError
from engine.settings import ScheduleSettings
from scripts.profile_kernels import Step, parse_args, planned
from scripts.profile_step import load_runner
from worker.config_values import ConfigValues
from worker.models.table import GENERIC, MODELS, family_of
from worker.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of one step."""

    own: float
    generic: float


def measure(
    own: ModelRunner, generic: ModelRunner, step: Step, turns: int, clock: Callable[[], float]
) -> Figures:
    fastest = [math.inf, math.inf]
    for _ in range(turns):
        for number, runner in enumerate((own, generic)):
            plan = step.plan(runner.vocab_size)
            begin = clock()
            runner.forward(plan)
            fastest[number] = min(fastest[number], clock() - begin)
    return Figures(*fastest)


def load_generic(model: Path, limits: ScheduleSettings, threads: int) -> ModelRunner:
    """As if the architecture had no family of its own."""
    name, _ = family_of(ConfigValues.read(model / "config.json"))
    row = MODELS.pop(name)
    try:
        return load_runner(model, limits, threads, "auto")
    finally:
        MODELS[name] = row


def table(figures: dict[Step, Figures]) -> str:
    lines = [f"{'':<14}" + "".join(f"{name:>15}" for name in ("own tok/s", "generic tok/s", "own / generic"))]
    for step, s in figures.items():
        cells = [f"{step.tokens / s.own:,.1f}", f"{step.tokens / s.generic:,.1f}", f"{s.generic / s.own:.2f}"]
        lines.append(f"{step.name:<14}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 when the model cannot be run, or runs in one way only."""
    args = parse_args(argv, __doc__, tokens=256)
    steps, limits = planned(args)
    try:
        if family_of(ConfigValues.read(args.model / "config.json"))[1] is GENERIC:
            raise ValueError(f"{args.model} has no family of its own")
        own = load_runner(args.model, limits, args.threads, "auto")
        generic = load_generic(args.model, limits, args.threads)
    except (StartupError, ValueError) as error:
        print(f"cannot profile: {error}", file=sys.stderr)
        return 2
    one_thread = torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    figures = {}
    for step in steps:
        print(f"{step.name} ...", file=sys.stderr, flush=True)
        turns = args.turns if step.fresh == 1 else max(2, args.turns // 3)
        figures[step] = measure(own, generic, step, turns, clock)
    print(
        f"{args.model.name}, {str(own.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, "
        f"{'processor' if one_thread else 'wall clock'} time; context {args.context}\n"
    )
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
