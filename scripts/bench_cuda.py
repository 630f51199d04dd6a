#!/usr/bin/env python3
"""What a GPU gives: decode steps against its memory's speed, and throughput beside transformers.

    python scripts/bench_cuda.py                          # writes a random 7B model first, 15 GB
    python scripts/bench_cuda.py --model DIR --batch 1,64 --streams 0

step         the median decode step of the real loop (scripts/profile_step.py), without HTTP
floor        what it has to read, weights and cached keys and values, over the bandwidth measured here
throughput   tokens per second of so many greedy streams, prefills included, without HTTP; beside it the
             continuous batching of transformers (`generate_batch`) on the same prompts

Targets, for a 7B shape: steps within 1.3 floors at batch 1 and 1.5 at batch 64; 3 times as many tokens at 256
streams. Not run on hardware so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from profile_step import (  # first: it prepares the environment before torch is loaded
    WARM_STEPS,
    Ends,
    blocks_needed,
    load_runner,
    make_ends,
    profile,
    schedule_settings,
    summarize,
)

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GenerationConfig
from write_random_model import SHAPES, write_model

from engine.block_manager import BlockManager
from engine.core import EngineCore
from engine.errors import StartupError
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from engine.settings import ScheduleSettings
from worker.executor import LeaderExecutor
from worker.runner import ModelRunner
from worker.sampler import Sampler

SHAPE = "qwen2.5-7b"
COPIED_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}  # far more than any cache holds
COPIES = 10
Prompts = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    batch: int
    ms: float
    floor_ms: float


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the best of some copies within the device's memory."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(COPIES):
        target[:1].item()  # what came before is done
        start = time.perf_counter()
        target.copy_(source)
        target[:1].item()
        best = min(best, time.perf_counter() - start)
    return 2 * len(source) / best


def looked_up_bytes(model: Path, element_bytes: int) -> int:
    """Of an embedding that is not the head too: a step reads a few of its rows."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tied = bool(config.get("tie_word_embeddings"))
    return 0 if tied else int(config["vocab_size"]) * int(config["hidden_size"]) * element_bytes


def measure_steps(runner: ModelRunner, ends: Ends, args: argparse.Namespace, bandwidth: float) -> list[Step]:
    weights = runner.weight_bytes - looked_up_bytes(args.model, runner.dtype.itemsize)
    steps = []
    for batch in args.batch:
        print(f"batch {batch} ...", file=sys.stderr, flush=True)
        limits = schedule_settings(batch, args.context, args.steps, args.block_size)
        ms = summarize(*profile(runner, ends, limits, args.context, args.steps, seed=0))["step"]
        tokens = args.context + WARM_STEPS + args.steps // 2  # of a sequence in the middle of the steps
        cached = batch * tokens * runner.block_bytes // args.block_size
        steps.append(Step(batch, ms, 1e3 * (weights + cached) / bandwidth))
    return steps


def our_throughput(
    runner: ModelRunner, ends: Ends, limits: ScheduleSettings, prompts: Prompts, out: int
) -> float:
    """Output tokens per second from the first prompt to the last token."""
    blocks = BlockManager(blocks_needed(limits), limits.block_size)
    scheduler = Scheduler(limits, blocks, runner.eos_token_ids)
    executor = LeaderExecutor(runner, Sampler(runner.vocab_size, device_draw=runner.device_draw))
    core = EngineCore(0, scheduler, executor, ends.link, ends.watched)
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        scheduler.add(SequenceGroup(number, prompt, params, now=time.monotonic()))
    while scheduler.running or scheduler.waiting:
        core.step()
        ends.empty()
    return len(prompts) * out / (time.perf_counter() - start)


def peer_throughput(model: Path, device: torch.device, prompts: Prompts, out: int) -> float:
    """The same of transformers, which captures its graphs in a run before the one that counts."""
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
    end = peer.generation_config.eos_token_id
    config = GenerationConfig(max_new_tokens=out, min_new_tokens=out, do_sample=False, eos_token_id=end)
    rate = 0.0
    for few in (prompts[:8], prompts):
        start = time.perf_counter()
        answers = peer.generate_batch(few.tolist(), generation_config=config)
        tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        rate = tokens / (time.perf_counter() - start)
    return rate


def steps_table(steps: Sequence[Step]) -> str:
    lines = [f"{'batch':>5}{'step ms':>10}{'floor ms':>10}{'ratio':>8}{'tok/s':>10}"]
    for step in steps:
        ratio, rate = step.ms / step.floor_ms, 1e3 * step.batch / step.ms
        lines.append(f"{step.batch:>5}{step.ms:>10.2f}{step.floor_ms:>10.2f}{ratio:>8.2f}{rate:>10.1f}")
    return "\n".join(lines)


def throughput_line(streams: int, rates: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {rate:.0f} tok/s" for name, rate in rates.items())
    ratio = f", ratio {rates['ours'] / rates['transformers']:.2f}" if "transformers" in rates else ""
    return f"{streams} streams: {told}{ratio}"


def batch_sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help=f"none: {SHAPE}, random, written for this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    parser.add_argument("--batch", type=batch_sizes, default=[1, 8, 64], help="sequences per step (1,8,64)")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens, for the steps (512)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps measured (64)")
    parser.add_argument("--block-size", type=int, default=128, help="tokens per KV block (128)")
    parser.add_argument("--streams", type=int, default=256, help="for the throughput (256); 0: leave it out")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of a stream (128)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of its answer (128)")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when the model cannot be run."""
    args = parse_args(argv)
    with ExitStack() as stack:
        if args.model is None:
            args.model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / SHAPE
            print(f"writing {args.model} ...", file=sys.stderr, flush=True)
            write_model(SHAPES[SHAPE], args.model)
        try:
            print(report(args, stack.enter_context(make_ends())))
        except (StartupError, ValueError) as error:
            print(f"cannot measure: {error}", file=sys.stderr)
            return 2
    return 0


def report(args: argparse.Namespace, ends: Ends) -> str:
    # one runner for all: graphs for the most rows, room for the longest texts
    streams = schedule_settings(max(args.streams, 1), args.input_len, args.output_len, args.block_size)
    longest = max(args.context + args.steps, args.input_len + args.output_len)
    rows = max(*args.batch, args.streams)
    largest = schedule_settings(rows, longest, args.steps, args.block_size)
    runner = load_runner(args.model, largest, 0, "bfloat16", device_type=args.device)
    bandwidth = measure_bandwidth(runner.device)
    steps = measure_steps(runner, ends, args, bandwidth)
    parts = [
        f"{args.model.name}, {args.device}, bandwidth {bandwidth / 1e9:.0f} GB/s; context {args.context}",
        steps_table(steps),
    ]
    if args.streams:
        shape = (args.streams, args.input_len)
        prompts = np.random.default_rng(1).integers(0, runner.vocab_size, shape, np.int32)
        rates = {"ours": our_throughput(runner, ends, streams, prompts, args.output_len)}
        if not args.no_peer:
            device = runner.device
            del runner  # the peer sizes its cache by what is free
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rates["transformers"] = peer_throughput(args.model, device, prompts, args.output_len)
        parts.append(throughput_line(args.streams, rates))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
