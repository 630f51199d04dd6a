#!/usr/bin/env python3
"""What a long prompt costs those who stream, in steps of templateType Mix and without a server.

    python scripts/profile_mix.py --model /tmp/random-0.5b --threads 1

`--streams` sequences decode; then a prompt of `--long` tokens comes. Each step beside a piece of it is
compared with the median of the steps without: a step is what makes the gap between two tokens of a stream.
Time is this process's processor time, so that other load does not show; the pace is set by it as well. With
more than one thread it adds up what all of them spend, waiting included. scripts/bench_mix.py measures the
same from outside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from profile_step import blocks_needed, load_runner, schedule_settings  # prepares the environment first

from engine.block_manager import BlockManager
from engine.mix import make_scheduler
from engine.plan import StepKind, StepPlan
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceGroup
from engine.settings import MixSettings
from worker.executor import LeaderExecutor
from worker.sampler import Sampler

_STEADY_STEPS = 20  # before the prompt comes, and half as many after it
_BLOCK = 128


def measure(args: argparse.Namespace) -> tuple[list[float], list[float], list[int]]:
    """Seconds of the steps that only decode and of the mixed ones, and tokens of a prompt in the latter."""
    mix = MixSettings(args.chunk, max_partial=64, long_threshold=1024, max_long_partial=8)
    limits = schedule_settings(args.streams + 1, args.long, args.long, _BLOCK)
    limits = replace(limits, mix=mix)
    runner = load_runner(args.model, limits, args.threads, args.dtype)
    blocks = BlockManager(blocks_needed(limits), _BLOCK)
    scheduler = make_scheduler(limits, blocks, ())
    executor = LeaderExecutor(runner, Sampler(runner.vocab_size))
    random = np.random.default_rng(args.seed)

    def add(number: int, prompt: int, output: int) -> None:
        ids = random.integers(0, runner.vocab_size, prompt, np.int32)
        scheduler.add(SequenceGroup(number, ids, SamplingParams(output), now=time.process_time()))

    def step() -> tuple[float, StepPlan]:
        start = time.process_time()
        plan = scheduler.schedule(start)
        assert plan is not None
        scheduler.commit(plan, executor.run(plan), time.process_time())
        return time.process_time() - start, plan

    for number in range(args.streams):
        add(number, args.short, args.long)
    while step()[1].kind is not StepKind.DECODE:
        pass
    steady = [step()[0] for _ in range(_STEADY_STEPS)]
    add(args.streams, args.long, 1)
    mixed: list[float] = []
    chunks: list[int] = []
    while (taken := step())[1].kind is StepKind.MIXED:
        mixed.append(taken[0])
        chunks.append(taken[1].num_tokens - args.streams)
    steady += [step()[0] for _ in range(_STEADY_STEPS // 2)]
    return steady, mixed, chunks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--short", type=int, default=256, help="tokens of a stream's prompt")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the prompt that comes")
    parser.add_argument("--chunk", type=int, default=0, help="prefillChunkSize; 0: as measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    steady, mixed, chunks = measure(args)
    usual = statistics.median(steady)
    ratios = sorted(seconds / usual for seconds in mixed)
    print(
        f"steady step {usual * 1e3:.1f} ms; {len(mixed)} mixed steps of {min(chunks)} to {max(chunks)} "
        "tokens: "
        f"p50 {statistics.median(ratios):.2f}, p99 {ratios[max(0, -(-len(ratios) * 99 // 100) - 1)]:.2f}, "
        f"longest {ratios[-1]:.2f} times as long"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
