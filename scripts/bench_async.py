#!/usr/bin/env python3
"""What planning ahead gains: decode steps with MINDIE_ASYNC_SCHEDULING_ENABLE and without, in one process.

    python scripts/bench_async.py --model models/mindie-tiny --batch 1,8,32 --context 256

For every batch size that many sequences are prefilled and decoded together by the real loops, without HTTP:
once by the loop that does one thing after the other, once by the one that plans while a thread computes, and
so on. Shown are the medians of all turns, and what part of a step the loop itself takes: receiving, planning,
committing and publishing. Beside a device all of that can be hidden; on the CPU only as far as there is a
core that does not compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from profile_step import (
    REPOSITORY,
    WARM_STEPS,
    Ends,
    blocks_needed,
    load_runner,
    make_ends,
    schedule_settings,
)

from engine.block_manager import BlockManager
from engine.core import EngineCore
from engine.errors import StartupError
from engine.overlap import OverlappedCore
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from engine.settings import ScheduleSettings
from engine.wire.sizes import TOKEN_SLOTS
from worker.executor import LeaderExecutor
from worker.runner import ModelRunner
from worker.sampler import Sampler

WAYS = ("in turn", "overlapped")
_SPARE_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    tokens_per_s: float
    step_ms: float  # median
    loop_ms: float  # of each step, what the loop itself takes; mean of all


def decode(
    core_class: Callable[..., EngineCore],
    runner: ModelRunner,
    ends: Ends,
    limits: ScheduleSettings,
    args: argparse.Namespace,
) -> Turn:
    """A full batch from its prompts to its end; what counts are `args.steps` steps in which all decode."""
    blocks = BlockManager(blocks_needed(limits), limits.block_size)
    scheduler = Scheduler(limits, blocks, runner.eos_token_ids)
    executor = LeaderExecutor(runner, Sampler(runner.vocab_size))
    core = core_class(0, scheduler, executor, ends.link, ends.watched)
    batch = limits.max_batch_size
    prompts = np.random.default_rng(args.seed).integers(0, runner.vocab_size, (batch, args.context), np.int32)
    params = SamplingParams(
        max_tokens=limits.max_iter_times,
        ignore_eos=True,
        temperature=args.temperature,
        top_k=50 if args.temperature else 0,
    )
    for number, prompt in enumerate(prompts):
        scheduler.add(SequenceGroup(number, prompt, params, now=time.monotonic()))
    ended: list[float] = []  # when each step did
    filling = 0
    while scheduler.has_work:
        filling += bool(scheduler.waiting)
        core.step()
        ended.append(time.perf_counter())
    ends.empty()
    first = filling + WARM_STEPS
    counted = ended[first : first + args.steps + 1]
    times = core.times
    loop_s = times.receive + times.schedule + times.commit + times.publish
    return Turn(
        tokens_per_s=batch * args.steps / (counted[-1] - counted[0]),
        step_ms=1e3 * statistics.median(np.diff(counted).tolist()),
        loop_ms=1e3 * loop_s / times.steps,
    )


def compare(
    runner: ModelRunner, ends: Ends, limits: ScheduleSettings, args: argparse.Namespace
) -> dict[str, Turn]:
    """Medians of `args.turns` turns of each way."""
    classes = (EngineCore, partial(OverlappedCore, set_up_thread=runner.set_up_thread))
    turns = [[decode(way, runner, ends, limits, args) for way in classes] for _ in range(args.turns)]
    return {name: median_turn([turn[way] for turn in turns]) for way, name in enumerate(WAYS)}


def median_turn(turns: Sequence[Turn]) -> Turn:
    return Turn(
        tokens_per_s=statistics.median(turn.tokens_per_s for turn in turns),
        step_ms=statistics.median(turn.step_ms for turn in turns),
        loop_ms=statistics.median(turn.loop_ms for turn in turns),
    )


def table(figures: Mapping[int, Mapping[str, Turn]]) -> str:
    lines = [f"{'batch':>5}  {'':<10}{'tok/s':>10}{'step ms':>10}{'loop ms':>10}{'ratio':>8}"]
    for batch, ways in figures.items():
        plain = ways[WAYS[0]]
        for name, turn in ways.items():
            ratio = turn.tokens_per_s / plain.tokens_per_s
            lines.append(
                f"{batch:>5}  {name:<10}{turn.tokens_per_s:>10.1f}{turn.step_ms:>10.3f}{turn.loop_ms:>10.3f}"
                f"{ratio:>8.3f}"
            )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "mindie-tiny")
    parser.add_argument("--batch", default="1,8,32", help="sequences decoded together (1,8,32)")
    parser.add_argument("--context", type=int, default=256, help="prompt tokens of each (256)")
    parser.add_argument("--steps", type=int, default=128, help="decode steps that count, of each turn (128)")
    parser.add_argument("--turns", type=int, default=5, help="of each way (5)")
    parser.add_argument("--block-size", type=int, default=128, help="tokens per KV block (128)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: one per core")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: drawn of the best 50 (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    args.batches = [int(size) for size in args.batch.split(",")]
    # nobody reads the ring while steps are measured
    most = TOKEN_SLOTS - _SPARE_SLOTS - WARM_STEPS - 2 * max(args.batches)
    if args.steps > most:
        parser.error(f"--steps {args.steps}: at most {most} with --batch {args.batch}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when the model cannot be run."""
    args = parse_args(argv)
    limits = {
        size: schedule_settings(size, args.context, args.steps, args.block_size) for size in args.batches
    }
    try:
        runner = load_runner(args.model, limits[max(args.batches)], args.threads, args.dtype)
    except (StartupError, ValueError) as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 2
    figures: dict[int, dict[str, Turn]] = {}
    with make_ends() as ends:
        for size in args.batches:
            print(f"batch {size} ...", file=sys.stderr, flush=True)
            figures[size] = compare(runner, ends, limits[size], args)
    print(
        f"{args.model.name}, {str(runner.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads; "
        f"context {args.context} tokens, medians of {args.turns} turns of {args.steps} decode steps\n\n"
        f"{table(figures)}"
    )
    if args.json:
        report: dict[str, Any] = {
            "model": args.model.name,
            "dtype": str(runner.dtype),
            "threads": torch.get_num_threads(),
            "context": args.context,
            "steps": args.steps,
            "turns": args.turns,
            "tokens_per_s": {
                str(size): {name: turn.tokens_per_s for name, turn in ways.items()}
                for size, ways in figures.items()
            },
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
