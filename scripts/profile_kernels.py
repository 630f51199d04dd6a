#!/usr/bin/env python3
"""What our compiled kernels are worth, and how far a step is from what its products and its bytes allow.

    python scripts/profile_kernels.py --model /tmp/random-0.5b --batch 1,8,32 --context 512 --prefill 2048

The model is loaded twice, once with torch alone, and both run the same steps in turn; the fastest of each
kind counts, as other work on the machine only ever adds.

ours, torch   the whole forward pass
ratio         torch / ours
products      our linear layers alone, one after the other with the same numbers of rows
/ products    ours / products: what everything else costs
floor         bytes of the weights over the read bandwidth measured here with as many threads
/ floor       ours / floor

With --threads 1 times are of the processor, which foreign work disturbs least, else of the clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages beside this folder

from worker.environment import prepare_environment

prepare_environment()  # as the daemon does, before torch is loaded

import numpy as np
import torch

from engine.errors import StartupError
from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence as TokenSequence
from engine.settings import ScheduleSettings
from scripts.profile_step import load_runner, schedule_settings
from worker.native import library
from worker.runner import ModelRunner

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 128
BANDWIDTH_BYTES = 256 * 2**20  # more than any cache holds
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass of `rows` sequences, each with that many tokens cached and new ones."""

    name: str
    rows: int
    cached: int
    fresh: int

    @property
    def tokens(self) -> int:
        return self.rows * self.fresh

    def plan(self, vocab_size: int) -> StepPlan:
        length = self.cached + self.fresh
        blocks = -(-length // BLOCK_SIZE)
        random = np.random.default_rng(0)
        sequences = []
        for row in range(self.rows):
            ids = random.integers(0, vocab_size, length).astype(np.int32)
            sequence = TokenSequence(row, ids, SamplingParams(max_tokens=1))
            sequence.num_computed = self.cached
            sequence.block_table = list(range(row * blocks, (row + 1) * blocks))
            sequences.append(sequence)
        kind = StepKind.DECODE if self.fresh == 1 else StepKind.PREFILL
        return build_plan(kind, sequences, BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds."""

    ours: float
    torch: float
    products: float


def run_products(runner: ModelRunner, step: Step) -> Callable[[], None]:
    """All linear layers of the step, the head for the last token of each sequence."""
    model = runner._model
    layers = {id(projection.layer): projection for projection in model.projections.values()}
    inputs = {
        projection.in_features: torch.randn(step.tokens, projection.in_features).to(runner.dtype)
        for projection in layers.values()
    }
    hidden = next(iter(layers.values())).in_features
    last = torch.randn(step.rows, hidden).to(runner.dtype)

    @torch.inference_mode()
    def run() -> None:
        for projection in layers.values():
            projection.layer(inputs[projection.in_features])
        model.logits(last)

    return run


def measure(
    ours: ModelRunner, other: ModelRunner, step: Step, turns: int, clock: Callable[[], float]
) -> Figures:
    plans = [step.plan(ours.vocab_size) for _ in range(2)]
    ways: list[Callable[[], object]] = [
        lambda: ours.forward(plans[0]),
        lambda: other.forward(plans[1]),
        run_products(ours, step),
    ]
    fastest = [float("inf")] * len(ways)
    for _ in range(turns):
        for number, run in enumerate(ways):
            begin = clock()
            run()
            fastest[number] = min(fastest[number], clock() - begin)
    return Figures(*fastest)


def read_bandwidth(clock: Callable[[], float], turns: int) -> float:
    """Bytes per second that all threads together read, from pages like those of the weights."""
    memory = library.empty_in_huge_pages((BANDWIDTH_BYTES // 4,), torch.float32)
    memory.fill_(1.0)
    fastest = float("inf")
    for _ in range(turns):
        begin = clock()
        memory.sum()
        fastest = min(fastest, clock() - begin)
    return BANDWIDTH_BYTES / fastest


def table(figures: dict[Step, Figures], floor_s: float) -> str:
    names = ("ours ms", "torch ms", "ratio", "products ms", "/ products", "floor ms", "/ floor")
    lines = [f"{'':<14}" + "".join(f"{name:>13}" for name in names)]
    for step, s in figures.items():
        cells = [f"{1e3 * s.ours:.2f}", f"{1e3 * s.torch:.2f}", f"{s.torch / s.ours:.2f}"]
        cells += [f"{1e3 * s.products:.2f}", f"{s.ours / s.products:.2f}"]
        cells += [f"{1e3 * floor_s:.2f}", f"{s.ours / floor_s:.2f}"] if step.fresh == 1 else []
        lines.append(f"{step.name:<14}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def load_without_kernels(model: Path, limits: ScheduleSettings, threads: int) -> ModelRunner:
    found, library.all_kernels = library.all_kernels, lambda: ()  # type: ignore[assignment]
    try:
        return load_runner(model, limits, threads, "auto")
    finally:
        library.all_kernels = found


def parse_args(argv: Sequence[str] | None, description: str | None, tokens: int) -> argparse.Namespace:
    """`tokens`: of a prompt and of each sequence, unless something else is said."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "mindie-tiny")
    parser.add_argument("--batch", default="1,8,32", help="sequences decoded together (1,8,32)")
    parser.add_argument("--context", type=int, default=tokens, help=f"tokens of each ({tokens})")
    parser.add_argument("--prefill", type=int, default=tokens, help=f"tokens of a prompt ({tokens})")
    parser.add_argument("--turns", type=int, default=10, help="of each step (10); a prompt has a third")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: one per core")
    return parser.parse_args(argv)


def planned(args: argparse.Namespace) -> tuple[list[Step], ScheduleSettings]:
    """The steps to measure, and limits that admit them."""
    sizes = [int(size) for size in args.batch.split(",")]
    steps = [Step(f"decode {size}", size, args.context - 1, 1) for size in sizes]
    steps.append(Step(f"prefill {args.prefill}", 1, 0, args.prefill))
    return steps, schedule_settings(max(sizes), max(args.context, args.prefill), 1, BLOCK_SIZE)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 when the model cannot be run, or nothing is compiled."""
    args = parse_args(argv, __doc__, tokens=512)
    if library.kernels() is None:
        print("there are no compiled kernels: python worker/native/build.py", file=sys.stderr)
        return 2
    steps, limits = planned(args)
    try:
        ours = load_runner(args.model, limits, args.threads, "auto")
        other = load_without_kernels(args.model, limits, args.threads)
    except (StartupError, ValueError) as error:
        print(f"cannot profile: {error}", file=sys.stderr)
        return 2
    one_thread = torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    figures = {}
    for step in steps:
        print(f"{step.name} ...", file=sys.stderr, flush=True)
        turns = args.turns if step.fresh == 1 else max(2, args.turns // 3)
        figures[step] = measure(ours, other, step, turns, clock)
    bandwidth = read_bandwidth(clock, args.turns)
    print(
        f"{args.model.name}, {str(ours.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, "
        f"{'processor' if one_thread else 'wall clock'} time; context {args.context}; "
        f"weights {ours.weight_bytes / MIB:.0f} MiB read at {bandwidth / 1e9:.1f} GB/s\n"
    )
    print(table(figures, ours.weight_bytes / bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
