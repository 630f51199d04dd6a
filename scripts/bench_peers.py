#!/usr/bin/env python3
"""The table of docs/benchmarks.md: this server beside any others that listen already, same load, in turn.

    python scripts/write_random_model.py --shape qwen2.5-0.5b --out .bench/qwen2.5-0.5b
    python scripts/write_random_model.py --shape tiny64 --out .bench/tiny64
    python scripts/bench_peers.py --model .bench/qwen2.5-0.5b --tiny .bench/tiny64 \\
        --peer vllm=http://127.0.0.1:8000 --json figures.json

Daemons of our own are started for it, over plain HTTP: one per kind of weights (--int8: a checkpoint that
scripts/quantize.py made out of --model). A peer is any server with OpenAI's completions; it must serve the
same weights in the same precision, and be given the same cores. Its user starts it before and ends it after.

single, c8, c32   512 or 256 tokens in, 128 out, 1, 8 and 32 streams
tiny64            next to no model: what the server itself costs, 64 streams, 32 in, 128 out

Closed loop, greedy, all prompts different. Repeats go round: each column is measured once before any is
measured again, so that a machine that slows down slows all of them. Medians over the repeats; a ratio is
that of the medians, ours over the best peer's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_serving import (
    MAX_OTHER_CORES,
    CpuMeter,
    Target,
    environment,
    medians,
    positive_int,
    random_prompts,
    request_body,
    run_load,
    spread,
    summarize,
    usable_ids,
)
from own_daemon import HOST, NAME, OwnDaemon, configuration, own_daemon

TIMEOUT_S = 1800.0
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    streams: int
    input_len: int
    output_len: int
    requests: int


WORKLOADS = (
    Workload("single", 1, 512, 128, 2),
    Workload("c8", 8, 256, 128, 16),
    Workload("c32", 32, 256, 128, 32),
)
TINY = Workload("tiny64", 64, 32, 128, 256)


@dataclass(frozen=True, slots=True)
class Column:
    """A server to be measured."""

    name: str
    target: Target
    model: str
    prompts: Iterator[list[int]]
    meter: CpuMeter

    def bodies(self, load: Workload) -> list[bytes]:
        args = argparse.Namespace(output_len=load.output_len, no_usage=False, plain=False)
        prompts = (next(self.prompts)[: load.input_len] for _ in range(load.requests))
        return [self.target.request(request_body(self.model, prompt, args)) for prompt in prompts]

    def measure(self, load: Workload, label: str) -> Figures:
        """One repeat."""
        before = self.meter.read()
        wall, answers = asyncio.run(run_load(self.target, self.bodies(load), load.streams, label))
        after = self.meter.read()
        for error in sorted({answer.error for answer in answers if answer.error})[:3]:
            print(f"{label}: {error}", file=sys.stderr)
        cpu = {role: after[role] - before[role] for role in after}
        return summarize(answers, wall, cpu, load.input_len, load.output_len)


def rounds(columns: Sequence[Column], load: Workload, repeats: int) -> dict[str, dict[str, Any]]:
    """Of every column its median figures and the repeats they come from."""
    taken: dict[str, list[Figures]] = {column.name: [] for column in columns}
    for column in columns:
        column.measure(Workload(load.name, 1, load.input_len, 4, 1), f"{column.name} warm-up")
    for repeat in range(repeats):
        for column in columns:
            label = f"{load.name} {column.name} {repeat + 1}/{repeats}"
            figures = column.measure(load, label)
            taken[column.name].append(figures)
            print(f"{label}: {figures['output_tok_s']:.1f} tok/s", file=sys.stderr, flush=True)
    return {
        name: {
            "median": medians(repeated) | {"spread_percent": 100 * spread(repeated, "output_tok_s")},
            "repeats": repeated,
        }
        for name, repeated in taken.items()
    }


# --- columns -------------------------------------------------------------------------------------------


def settings(longest: int, streams: int) -> dict[str, Any]:
    """Room for the workload, nothing else differs from the stock configuration."""
    return {
        "BackendConfig": {
            "ModelDeployConfig": {"maxSeqLen": longest, "maxInputTokenLen": longest - 1},
            "ScheduleConfig": {
                "maxBatchSize": streams,
                "maxPrefillBatchSize": streams,
                "maxIterTimes": min(512, longest),
            },
        }
    }


@contextlib.contextmanager
def our_column(
    name: str, model: Path, longest: int, streams: int, seed: int, plugin: Mapping[str, Any] | None = None
) -> Iterator[Column]:
    """`plugin`: its plugin_params."""
    config = configuration(settings(longest, streams), mock=False, model=model)
    if plugin:
        deploy = config["BackendConfig"]["ModelDeployConfig"]
        deploy["speculationGamma"] = 16
        deploy["ModelConfig"][0]["plugin_params"] = dict(plugin)
    with own_daemon(config) as daemon:
        url = f"http://{HOST}:{daemon.port}"
        yield Column(name, _target(url), NAME, _prompts(model, seed), _meter(daemon))


def peer_column(name: str, url: str, model: Path, seed: int) -> Column:
    target = _target(url)
    return Column(name, target, target.first_model(), _prompts(model, seed), CpuMeter(None, None))


def _target(url: str) -> Target:
    return Target(urlsplit(url), None, TIMEOUT_S)


def _prompts(model: Path, seed: int) -> Iterator[list[int]]:
    return random_prompts(usable_ids(model, None), max(load.input_len for load in WORKLOADS), seed)


def _meter(daemon: OwnDaemon) -> CpuMeter:
    return CpuMeter(daemon.pid, daemon.endpoint.pid)


# --- report --------------------------------------------------------------------------------------------

Results = dict[str, dict[str, dict[str, Any]]]  # workload -> column -> figures


def table(results: Results, ours: Sequence[str]) -> str:
    """A row per workload and figure, a column per server, and ours over the best peer's."""
    columns = list(dict.fromkeys(name for row in results.values() for name in row))
    head = ["", "", *columns, "ours / best peer"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for workload, row in results.items():
        for title, figure, digits, best in (
            ("tok/s", "output_tok_s", 1, max),
            ("TTFT p50 ms", "ttft_ms_p50", 0, min),
            ("TPOT p50 ms", "tpot_ms_p50", 1, min),
            ("endpoint us/token", "endpoint_us_per_token", 1, None),
        ):
            values = {name: row[name]["median"].get(figure) for name in columns if name in row}
            if not any(value is not None for value in values.values()):
                continue
            cells = [f"{values[n]:,.{digits}f}" if values.get(n) is not None else "" for n in columns]
            peers = [value for name, value in values.items() if name not in ours and value]
            own = values.get(ours[0])
            ratio = f"{own / best(peers):.2f}" if best and peers and own else ""
            lines.append("| " + " | ".join([workload, title, *cells, ratio]) + " |")
    return "\n".join(lines)


def noisy(results: Results) -> bool:
    medians_of = (column["median"] for row in results.values() for column in row.values())
    return any(figures.get("other_cores", 0.0) > MAX_OTHER_CORES for figures in medians_of)


# --- command line --------------------------------------------------------------------------------------


def named_url(text: str) -> tuple[str, str]:
    """An argparse type: NAME=URL."""
    name, found, url = text.partition("=")
    if not found or not name or urlsplit(url).scheme != "http":
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=http://HOST:PORT")
    return name, url


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="a bf16 checkpoint: single, c8, c32")
    parser.add_argument("--int8", type=Path, help="the same, quantised: a column of its own")
    parser.add_argument("--tiny", type=Path, help="a nearly empty model: tiny64")
    parser.add_argument("--peer", type=named_url, action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--tiny-peer", type=named_url, action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--workloads", default="single,c8,c32", help="of --model (single,c8,c32)")
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    args = parser.parse_args(argv)
    if not (args.model or args.tiny):
        parser.error("--model or --tiny is needed")
    wanted = args.workloads.split(",")
    unknown = sorted(set(wanted) - {load.name for load in WORKLOADS})
    if unknown:
        parser.error(f"--workloads: {', '.join(unknown)} unknown; there are single, c8, c32")
    args.workloads = [load for load in WORKLOADS if load.name in wanted]
    return args


def measure(args: argparse.Namespace) -> Results:
    results: Results = {}
    with contextlib.ExitStack() as stack:

        def ours(name: str, model: Path, loads: Sequence[Workload]) -> Column:
            longest = max(load.input_len + load.output_len for load in loads) + 1
            streams = max(load.streams for load in loads)
            return stack.enter_context(our_column(name, model, longest, streams, args.seed))

        if args.model:
            columns = [ours("bf16", args.model, args.workloads)]
            columns += [ours("int8", args.int8, args.workloads)] if args.int8 else []
            columns += [peer_column(name, url, args.model, args.seed) for name, url in args.peer]
            for load in args.workloads:
                results[load.name] = rounds(columns, load, args.repeats)
        if args.tiny:
            columns = [ours("bf16", args.tiny, [TINY])]
            columns += [peer_column(name, url, args.tiny, args.seed) for name, url in args.tiny_peer]
            results[TINY.name] = rounds(columns, TINY, args.repeats)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every request was answered, 1 when some failed, 2 when nothing could be measured."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)
    try:
        results = measure(args)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        print(f"cannot measure: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    header = environment(str(args.model or args.tiny), argv)
    for name, value in header.items():
        print(f"{name:<10}{value}")
    print(f"\n{table(results, ['bf16', 'int8'])}")
    if noisy(results):
        print(f"\nother processes used more than {MAX_OTHER_CORES} core: do not judge by these figures")
    if args.json:
        report = {"environment": header, "results": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(column["median"]["failed"] for row in results.values() for column in row.values()))


if __name__ == "__main__":
    sys.exit(main())
