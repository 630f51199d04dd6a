#!/usr/bin/env python3
"""Where the time of a decode step goes, without HTTP: the real step loop in this process, on a real model.

    python scripts/profile_step.py --model models/mindie-tiny --batch 1,8,32 --context 256
    python scripts/profile_step.py --model models/mindie-tiny --seeds   # what seeds cost instead
    python scripts/profile_step.py --model DIR --against DIR     # two models in turn, one quantised perhaps

For every batch size that many sequences are prefilled, then decoded together; medians of the steps are shown.

receive   looking for new requests
schedule  choosing the batch and allocating its blocks
plan      laying the step out as arrays (build_plan)
tensors   moving the arrays to the device (make_batch)
forward   the model and its logits
sample    tokens out of logits
commit    updating the sequences
publish   writing the token record to the ring, which is emptied after each step

`plan` and `tensors` are timed by doing them once more; they are taken off `schedule` and `forward`. What the
endpoint adds to a token is measured from outside: scripts/bench_serving.py --daemon-pid.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages beside this folder

from worker.environment import prepare_environment

prepare_environment()  # as the daemon does, before torch is loaded

import numpy as np
import torch
import zmq

from engine.block_manager import BlockManager
from engine.core import EngineCore, Watched
from engine.endpoint_link import EndpointLink, LinkEnds
from engine.errors import StartupError
from engine.executor import Sampled
from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from engine.settings import ModelSettings, ScheduleSettings
from engine.wire import layout, sizes
from engine.wire.channel import Channel
from engine.wire.messages import EngineReady
from engine.wire.ring import RingReader, RingWriter, create_ring
from engine.wire.vitals import Vitals
from worker.batch import make_batch
from worker.executor import LeaderExecutor
from worker.runner import ModelRunner
from worker.sampler import Sampler

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("receive", "schedule", "plan", "tensors", "forward", "sample", "commit", "publish")
WARM_STEPS = 4  # decode steps before the first that counts
PREFILL_TOKENS = 2048  # per step, while filling

Times = dict[str, float]


class ProbingExecutor:
    """Passes steps on, and times the layout of each by repeating it."""

    def __init__(self, inner: LeaderExecutor, block_size: int) -> None:
        self.inner = inner
        self.plan_s = 0.0
        self.tensors_s = 0.0
        self.processor_s = 0.0  # of the repetition
        self.last_kind = StepKind.PREFILL
        self._block_size = block_size

    def run(self, plan: StepPlan) -> Sampled:
        start, processor = time.perf_counter(), time.process_time()
        again = build_plan(plan.kind, plan.sequences, self._block_size)
        planned = time.perf_counter()
        make_batch(again, torch.device("cpu"))
        self.tensors_s += time.perf_counter() - planned
        self.plan_s += planned - start
        self.processor_s += time.process_time() - processor
        self.last_kind = plan.kind
        return self.inner.run(plan)


@dataclass(frozen=True, slots=True)
class Ends:
    """The engine's own ends, and the far ones that endpoint and parent would have."""

    link: EndpointLink
    watched: Watched
    tokens: RingReader
    events: Channel

    def empty(self) -> None:
        while (slot := self.tokens.take()) is not None:
            layout.read_tokens(slot)
            self.tokens.release()
        for _ in self.events.receive():
            pass


@contextmanager
def make_ends() -> Iterator[Ends]:
    name = f"mindie_{os.getuid()}_{os.getpid()}_profile"
    prompts = create_ring(f"{name}_prompt", 1, sizes.prompt_slot_bytes(1))
    tokens = create_ring(f"{name}_token", sizes.TOKEN_SLOTS, sizes.TOKEN_SLOT_BYTES)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    events = Channel(context, zmq.PULL, "inproc://events", bind=True)
    control = Channel(context, zmq.PULL, "inproc://control", bind=True)
    ends = LinkEnds(
        commands=Channel(context, zmq.PULL, "inproc://commands", bind=True),
        events=Channel(context, zmq.PUSH, "inproc://events"),
        prompts=RingReader(prompts),
        tokens=RingWriter(tokens),
    )
    link = EndpointLink(lambda generation: ends, lambda: EngineReady(0, 1, 1, 1, 1, "cpu", ""))
    link.open(0)
    try:
        yield Ends(link, Watched(control, Vitals(1).pulse(0), 3600.0), RingReader(tokens), events)
    finally:
        link.close()
        for channel in (control, events):
            channel.close()
        context.term()


def schedule_settings(batch: int, context: int, steps: int, block_size: int) -> ScheduleSettings:
    """Room for `batch` sequences of `context` tokens that decode through all steps."""
    output = WARM_STEPS + steps + 2
    return ScheduleSettings(
        block_size=block_size,
        max_prefill_batch_size=batch,
        max_prefill_tokens=max(context, PREFILL_TOKENS),
        max_batch_size=batch,
        # while some sequences still prefill, the others may already decode
        max_iter_times=output + batch,
        max_queue_delay_us=0,
        max_first_token_wait_ms=3_600_000,
        max_n=1,
        max_seq_len=context + output + batch,
        max_input_len=context,
        truncation="off",
    )


def blocks_needed(limits: ScheduleSettings) -> int:
    """With some to spare: the scheduler holds prefills back when few are free."""
    needed = limits.max_batch_size * -(-limits.max_seq_len // limits.block_size)
    return needed + needed // 10 + 1


def load_runner(
    model: Path,
    limits: ScheduleSettings,
    threads: int,
    dtype: Literal["auto", "float32", "bfloat16"],
    kv_cache_dtype: Literal["auto", "int8"] = "auto",
    device_type: Literal["cpu", "cuda"] = "cpu",
) -> ModelRunner:
    settings = ModelSettings(
        name=model.name,
        weight_path=model,
        instance_type="Standard",
        device_type=device_type,
        dtype=dtype,
        kv_cache_gib=-1,
        kv_cache_mib=0,
        kv_block_num=blocks_needed(limits),
        memory_fraction=0.8,
        cpu_threads=threads,
        trust_remote_code=False,
        ignore_eos=True,
        world_size=1,
        cpu_mem_gib=0,
        kv_cache_dtype=kv_cache_dtype,
    )
    runner = ModelRunner(settings, limits, 0, lambda phase, fraction: None)
    runner.load()
    if limits.max_seq_len > runner.max_position_embeddings:
        raise ValueError(
            f"{limits.max_seq_len} tokens are more than the model's {runner.max_position_embeddings}"
        )
    runner.allocate(runner.size_kv_cache())
    runner.warm_up()
    return runner


def profile(
    runner: ModelRunner,
    ends: Ends,
    limits: ScheduleSettings,
    context: int,
    steps: int,
    seed: int,
    reproducible: bool = False,
) -> tuple[list[Times], list[Times]]:
    """Seconds of each part for `steps` decode steps of a full batch, and for each prefill step."""
    executor = ProbingExecutor(LeaderExecutor(runner, Sampler(runner.vocab_size)), limits.block_size)
    blocks = BlockManager(blocks_needed(limits), limits.block_size)
    core = EngineCore(0, Scheduler(limits, blocks, runner.eos_token_ids), executor, ends.link, ends.watched)
    batch = limits.max_batch_size
    prompts = np.random.default_rng(seed).integers(0, runner.vocab_size, (batch, context), np.int32)
    params = SamplingParams(max_tokens=limits.max_iter_times, ignore_eos=True, reproducible=reproducible)
    for number, prompt in enumerate(prompts):
        core.scheduler.add(SequenceGroup(number, prompt, params, now=time.monotonic()))

    decodes: list[Times] = []
    prefills: list[Times] = []
    while len(decodes) < WARM_STEPS + steps:
        before = parts_so_far(core, executor)
        core.step()
        ends.empty()
        after = parts_so_far(core, executor)
        taken = {part: after[part] - before[part] for part in before}
        if executor.last_kind is StepKind.PREFILL:
            prefills.append(taken)
        elif len(core.scheduler.running) == batch:
            decodes.append(taken)
    return decodes[WARM_STEPS:], prefills


def parts_so_far(core: EngineCore, executor: ProbingExecutor) -> Times:
    """Seconds of each part since the start; together they are the loop's time without the probing.

    `processor`: what this process has spent, waiting threads that spin included; foreign load does not show.
    """
    return {
        "receive": core.times.receive,
        "schedule": core.times.schedule - executor.plan_s,
        "plan": executor.plan_s,
        "tensors": executor.tensors_s,
        "forward": executor.inner.times.forward - executor.tensors_s,
        "sample": executor.inner.times.sample,
        "commit": core.times.commit,
        "publish": core.times.publish,
        "processor": time.process_time() - executor.processor_s,
    }


def summarize(decodes: Sequence[Times], prefills: Sequence[Times]) -> Times:
    """Median ms of each part and of the whole step, and ms of all prefill steps together."""
    medians = {part: 1e3 * statistics.median(times[part] for times in decodes) for part in PARTS}
    medians["step"] = 1e3 * statistics.median(sum(times[part] for part in PARTS) for times in decodes)
    medians["prefill"] = 1e3 * sum(times[part] for times in prefills for part in PARTS)
    return medians


def table(batches: Mapping[int, Times]) -> str:
    """A row per part; for each batch size ms and share of the step."""
    lines = [f"{'batch':<10}" + "".join(f"{batch:>20}" for batch in batches)]
    lines.append(f"{'':<10}" + f"{'ms':>12}{'%':>8}" * len(batches))
    for part in (*PARTS, "step"):
        cells = (f"{ms[part]:>12.3f}{100 * ms[part] / ms['step']:>8.1f}" for ms in batches.values())
        lines.append(f"{part:<10}" + "".join(cells))
    return "\n".join(lines)


def compare_seeds(
    runner: ModelRunner, ends: Ends, limits: ScheduleSettings, args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Median ms of processor time without and with seeds, in turn, of a decode step and of all prefills."""
    turns: dict[str, list[tuple[float, float]]] = {"decode": [], "prefill": []}
    for _ in range(args.turns):
        ways = [
            profile(runner, ends, limits, args.context, args.steps, args.seed, reproducible)
            for reproducible in (False, True)
        ]
        for name, figure in (("decode", statistics.median), ("prefill", sum)):
            steps = [[1e3 * times["processor"] for times in way[name == "prefill"]] for way in ways]
            turns[name].append((figure(steps[0]), figure(steps[1])))
    return {
        name: (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))
        for name, pairs in turns.items()
    }


def seeds_table(figures: Mapping[int, dict[str, tuple[float, float]]]) -> str:
    lines = [f"{'processor ms':<14}{'without':>10}{'with':>10}{'ratio':>8}"]
    for batch, named in figures.items():
        for name, (without, seeded) in named.items():
            lines.append(f"{f'{name} {batch}':<14}{without:>10.2f}{seeded:>10.2f}{seeded / without:>8.2f}")
    return "\n".join(lines)


def compare_models(
    runners: Sequence[ModelRunner], ends: Ends, limits: ScheduleSettings, args: argparse.Namespace
) -> dict[str, list[float]]:
    """ms of processor time of a decode step and of all prefills for each model: the least of all turns."""
    turns: dict[str, list[list[float]]] = {"decode": [], "prefill": []}
    for _ in range(args.turns):
        ways = [profile(runner, ends, limits, args.context, args.steps, args.seed) for runner in runners]
        for name, figure in (("decode", statistics.median), ("prefill", sum)):
            steps = [[1e3 * times["processor"] for times in way[name == "prefill"]] for way in ways]
            turns[name].append([figure(times) for times in steps])
    return {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in turns.items()}


def models_table(figures: Mapping[int, dict[str, list[float]]]) -> str:
    lines = [f"{'processor ms':<14}{'first':>10}{'second':>10}{'ratio':>8}"]
    for batch, named in figures.items():
        for name, (first, second) in named.items():
            lines.append(f"{f'{name} {batch}':<14}{first:>10.2f}{second:>10.2f}{first / second:>8.2f}")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "mindie-tiny")
    parser.add_argument("--batch", default="1,8,32", help="sequences decoded together (1,8,32)")
    parser.add_argument("--context", type=int, default=256, help="prompt tokens of each (256)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps measured (64)")
    parser.add_argument("--block-size", type=int, default=128, help="tokens per KV block (128)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: one per core")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto",
                        help="what keys and values are kept in; with --against, by the second")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--seeds", action="store_true", help="instead: what seeds cost, both ways in turn")
    parser.add_argument("--against", type=Path, metavar="DIR", help="instead: this model too, both in turn")
    parser.add_argument("--turns", type=int, default=5, help="of --seeds and --against (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when the model cannot be run."""
    args = parse_args(argv)
    sizes = [int(size) for size in args.batch.split(",")]
    try:
        largest = schedule_settings(max(sizes), args.context, args.steps, args.block_size)
        first, second = ("auto", args.kv_cache_dtype) if args.against else (args.kv_cache_dtype, "auto")
        runner = load_runner(args.model, largest, args.threads, args.dtype, first)
        other = load_runner(args.against, largest, args.threads, args.dtype, second) if args.against else None
    except (StartupError, ValueError) as error:
        print(f"cannot profile: {error}", file=sys.stderr)
        return 2
    about = (
        f"{args.model.name}, {str(runner.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads; "
        f"context {args.context} tokens"
    )
    if args.seeds:
        with make_ends() as ends:
            compared = {
                size: compare_seeds(
                    runner, ends, schedule_settings(size, args.context, args.steps, args.block_size), args
                )
                for size in sizes
            }
        print(
            f"{about}, medians of {args.turns} turns of {args.steps} decode steps\n\n{seeds_table(compared)}"
        )
        return 0
    if other is not None:
        with make_ends() as ends:
            both = {
                size: compare_models(
                    (runner, other),
                    ends,
                    schedule_settings(size, args.context, args.steps, args.block_size),
                    args,
                )
                for size in sizes
            }
        print(
            f"{about}; second: {args.against.name}; medians of {args.steps} decode steps, "
            f"the least of {args.turns} turns\n\n{models_table(both)}"
        )
        return 0
    figures: dict[int, Times] = {}
    with make_ends() as ends:
        for size in sizes:
            print(f"batch {size} ...", file=sys.stderr, flush=True)
            limits = schedule_settings(size, args.context, args.steps, args.block_size)
            figures[size] = summarize(*profile(runner, ends, limits, args.context, args.steps, args.seed))
    print(f"{about}, medians of {args.steps} decode steps\n\n{table(figures)}")
    if args.json:
        report: dict[str, Any] = {
            "model": args.model.name,
            "dtype": str(runner.dtype),
            "threads": torch.get_num_threads(),
            "context": args.context,
            "steps": args.steps,
            "median_ms": {str(size): ms for size, ms in figures.items()},
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
