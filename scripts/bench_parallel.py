#!/usr/bin/env python3
"""What dividing a model among ranks costs and gains: work, speed, start-up, what steps say to ranks.

    python scripts/bench_parallel.py --ranks 1,2,4
    python scripts/bench_parallel.py --ranks 1,2 --model DIR --input 512 --whole-experts

For each number of ranks it starts a daemon of its own with one thread per rank, sends the same requests, and
tells the processor seconds of each rank and their sum over that of one rank alone: what is above 1 is work
done twice and exchange. Beside the gain in tokens per second stands what it could be at most if no rank ever
waited: the work of one rank alone over that of the busiest rank. Where the ranks have fewer cores than there
are of them, no gain is to be expected.

Then, without a daemon: bytes of a step on its way to a rank, and the time it takes the leader to lay them out
and to hand them over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_serving import Target, random_prompts, read_answer, usable_ids
from own_daemon import HOST, NAME, TINY_MODEL, OwnDaemon, configuration, own_daemon

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence as EngineSequence
from engine.step_channel import StepReceiver, StepSender
from engine.step_records import encode
from engine.wire import sizes
from engine.wire.ring import RingReader, RingWriter, create_ring
from worker.config_values import ConfigValues

_BLOCK = 128
# what a step is -> its kind, rows, tokens in the cache of each, tokens computed of each
STEPS = {
    "decode 1": (StepKind.DECODE, 1, 1024, 1),
    "decode 32": (StepKind.DECODE, 32, 1024, 1),
    "decode 200": (StepKind.DECODE, 200, 1024, 1),
    "prefill 4 x 1024": (StepKind.PREFILL, 4, 1024, 1024),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one daemon."""

    start_s: float  # until it serves
    processor_s: list[float]  # of each rank
    tokens_per_s: float


async def _load(daemon: OwnDaemon, args: argparse.Namespace) -> Run:
    target = Target(urlsplit(f"http://{HOST}:{daemon.port}"), None, 600.0)
    prompts = random_prompts(usable_ids(None, args.vocab_size), args.input, args.seed)
    left = iter([next(prompts) for _ in range(args.requests)])

    async def one_client() -> None:
        connection = await target.connect()
        for prompt in left:
            body = {
                "model": NAME, "prompt": prompt, "max_tokens": args.output, "temperature": 0, "stream": True,
                "ignore_eos": True,
            }  # fmt: skip
            answer = read_answer(*await connection.exchange(target.request(body)))
            if answer.error:
                raise RuntimeError(f"a request failed: {answer.error}")
        connection.close()

    workers = [child for child in psutil.Process(daemon.pid).children() if child.pid != daemon.endpoint.pid]
    before = [_processor_s(worker) for worker in workers]
    began = time.monotonic()
    await asyncio.gather(*(one_client() for _ in range(args.clients)))
    took = time.monotonic() - began
    used = [_processor_s(worker) - was for worker, was in zip(workers, before, strict=True)]
    return Run(0.0, used, args.requests * args.output / took)


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run_with(ranks: int, args: argparse.Namespace) -> Run:
    began = time.monotonic()
    moe_ep = ranks if args.whole_experts else 1
    with own_daemon(config_of(ranks, args.model, moe_ep)) as daemon:
        started = time.monotonic() - began
        run = asyncio.run(_load(daemon, args))
    return Run(started, run.processor_s, run.tokens_per_s)


def config_of(ranks: int, model: Path, moe_ep: int = 1) -> dict[str, Any]:
    changes = {"npuDeviceIds": [list(range(ranks))], "runtimeConfig": {"cpuThreads": 1}}
    config = configuration({"BackendConfig": changes}, mock=False, model=model)
    config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0] |= {
        "worldSize": ranks, "moe_ep": moe_ep,
    }  # fmt: skip
    return config


def ranks_table(runs: dict[int, Run]) -> str:
    """`runs`: by number of ranks; the smallest is what the others are compared with."""
    fewest = min(runs)
    alone = runs[fewest]
    lines = [
        f"| ranks | start s | processor s of each | sum / that of {fewest} | tokens/s | / that of {fewest} |"
        " at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks, run in runs.items():
        cells = [
            str(ranks),
            f"{run.start_s:.1f}",
            ", ".join(f"{used:.1f}" for used in run.processor_s),
            f"{sum(run.processor_s) / sum(alone.processor_s):.2f}",
            f"{run.tokens_per_s:.0f}",
            f"{run.tokens_per_s / alone.tokens_per_s:.2f}",
            f"{max(alone.processor_s) / max(run.processor_s):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- what a step says to the ranks ----------------------------------------------------------------------


def make_step(kind: StepKind, rows: int, context: int, computed: int) -> StepPlan:
    """`rows` sequences of `context` tokens, of which the last `computed` are to be computed."""
    blocks = -(-context // _BLOCK)
    sequences = []
    for row in range(rows):
        sequence = EngineSequence(row, np.zeros(context, np.int32), SamplingParams(max_tokens=1))
        sequence.num_computed = context - computed
        sequence.block_table = list(range(row * blocks, (row + 1) * blocks))
        sequences.append(sequence)
    return build_plan(kind, sequences, _BLOCK)


@dataclass(frozen=True, slots=True)
class Message:
    num_bytes: int
    encode_us: float
    send_us: float  # to each rank


def tell(plan: StepPlan, num_followers: int, repeats: int) -> Message:
    """Medians over `repeats`. The rings are emptied outside of what is timed."""
    rings = [
        create_ring(f"bench_parallel_{os.getpid()}_{rank}", sizes.STEP_SLOTS, sizes.STEP_SLOT_BYTES)
        for rank in range(num_followers)
    ]
    sender = StepSender([RingWriter(ring) for ring in rings], timeout_s=1.0)
    receivers = [StepReceiver(RingReader(ring)) for ring in rings]
    encoding, sending = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        record = encode(plan)
        encoded = time.perf_counter()
        sender.send(record)
        sent = time.perf_counter()
        for receiver in receivers:
            if receiver.take(1.0) != record:
                raise RuntimeError("a rank has read something else than what was sent")
        encoding.append(encoded - began)
        sending.append((sent - encoded) / num_followers)
    return Message(len(record), statistics.median(encoding) * 1e6, statistics.median(sending) * 1e6)


def steps_table(num_followers: int, repeats: int) -> str:
    lines = ["| step | bytes | to lay out, us | to each rank, us |", "|---|---|---|---|"]
    for name, shape in STEPS.items():
        told = tell(make_step(*shape), num_followers, repeats)
        lines.append(f"| {name} | {told.num_bytes} | {told.encode_us:.0f} | {told.send_us:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_MODEL, metavar="DIR", help="a model directory")
    parser.add_argument(
        "--whole-experts", action="store_true", help="deal a layer's experts to the ranks (moe_ep)"
    )
    parser.add_argument("--ranks", default="1,2,4", help='numbers of ranks; "" = only what steps say')
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--input", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=200, help="of each step that is told")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.vocab_size = ConfigValues.read(args.model / "config.json").positive("vocab_size")
    ranks = sorted({int(number) for number in args.ranks.split(",") if number})
    if ranks:
        load = f"{args.requests} requests of {args.input} + {args.output} tokens, {args.clients} at once"
        print(f"{args.model.name}, {load}\n")
        print(ranks_table({number: run_with(number, args) for number in ranks}), flush=True)
        print()
    print(steps_table(max([2, *ranks]) - 1, args.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
