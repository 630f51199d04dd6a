#!/usr/bin/env python3
"""What a long prompt costs those who stream: gaps between tokens, with templateType Mix and without.

    python scripts/bench_mix.py --model /tmp/random-0.5b

Starts a daemon of its own for each template. While `--streams` answers stream, prompts of `--long` tokens
come one after the other, with pauses between them. A gap between two frames of a stream belongs to an arrival
when it overlaps the time from the request to its first token; the others are steady.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_serving import Answer, Connection, Target, random_prompts, read_answer, usable_ids
from own_daemon import HOST, NAME, OwnDaemon, configuration, own_daemon

_BEGUN_READS = 16  # of each stream, before anything is measured
_ENDLESS = 4000  # tokens of a stream: it is cut off when all is measured
_LONG_ROOM = 4096
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of one template; seconds."""

    steady: list[float]
    arrival: list[float]
    first_tokens: list[float]  # of the long prompts

    def figures(self) -> dict[str, float]:
        steady = statistics.median(self.steady)
        worst = sorted(self.arrival)[max(0, -(-len(self.arrival) * 99 // 100) - 1)]
        return {
            "steady_p50_ms": steady * 1e3,
            "arrival_p50_ms": statistics.median(self.arrival) * 1e3,
            "arrival_p99_ms": worst * 1e3,
            "p99_ratio": worst / steady,
            "long_ttft_ms": statistics.median(self.first_tokens) * 1e3,
        }


def sort_gaps(streams: Sequence[Answer], long: Sequence[Answer], begun: float, ended: float) -> Gaps:
    """Of the streams' frames between `begun` and `ended`."""
    spans = [(answer.sent, answer.frames[0]) for answer in long]
    steady, arrival = [], []
    for answer in streams:
        for before, after in pairwise(at for at in answer.frames if begun <= at <= ended):
            overlaps = any(before < end and after > start for start, end in spans)
            (arrival if overlaps else steady).append(after - before)
    return Gaps(steady, arrival, [end - start for start, end in spans])


async def measure(daemon: OwnDaemon, args: argparse.Namespace) -> Gaps:
    target = Target(urlsplit(f"http://{HOST}:{daemon.port}"), None, 600.0)
    ids = usable_ids(None, args.vocab_size)
    shorts, longs = random_prompts(ids, args.short, args.seed), random_prompts(ids, args.long, args.seed + 1)

    def body(prompt: list[int], max_tokens: int) -> bytes:
        return target.request(
            {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
             "ignore_eos": True}
        )  # fmt: skip

    connections: list[Connection] = [await target.connect() for _ in range(args.streams)]
    streaming = [
        asyncio.ensure_future(connection.exchange(body(next(shorts), _ENDLESS))) for connection in connections
    ]
    while min(connection.num_reads for connection in connections) < _BEGUN_READS:
        await asyncio.sleep(_POLL_S)
    clock = asyncio.get_running_loop().time  # the clock of Connection too: both are monotonic
    begun = clock()
    answers = []
    for _ in range(args.arrivals):
        await asyncio.sleep(args.pause)
        connection = await target.connect()
        answers.append(read_answer(*await connection.exchange(body(next(longs), 1))))
        connection.close()
    await asyncio.sleep(args.pause)
    ended = clock()
    for connection in connections:
        connection.close()
    streams = [read_answer(*read) for read in await asyncio.gather(*streaming)]
    wrong = [answer.error for answer in answers if answer.error]
    if wrong:
        raise RuntimeError(f"a long prompt failed: {wrong[0]}")
    return sort_gaps(streams, answers, begun, ended)


def config_of(template: str, args: argparse.Namespace) -> dict[str, Any]:
    room = args.long + _LONG_ROOM
    config = configuration(
        {
            "BackendConfig": {
                "ModelDeployConfig": {"maxSeqLen": room, "maxInputTokenLen": args.long},
                "ScheduleConfig": {
                    "templateType": template,
                    "maxPrefillTokens": room,
                    "maxIterTimes": _ENDLESS,
                    "prefillChunkSize": args.chunk if template == "Mix" else 0,
                },
                "runtimeConfig": {"cpuThreads": args.threads},
            }
        },
        mock=False,
        model=args.model,
    )
    if template == "Mix":
        model = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
        model["plugin_params"] = json.dumps({"plugin_type": "splitfuse"})
    return config


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--templates", default="Mix,Standard", help="which, comma separated")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--short", type=int, default=256, help="tokens of a stream's prompt")
    parser.add_argument("--long", type=int, default=2048, help="tokens of a prompt that arrives")
    parser.add_argument("--arrivals", type=int, default=3)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before each arrival")
    parser.add_argument("--chunk", type=int, default=0, help="prefillChunkSize; 0: as measured")
    parser.add_argument("--threads", type=int, default=0, help="cpuThreads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    document = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    args.vocab_size = document["vocab_size"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    found = {}
    for template in args.templates.split(","):
        with own_daemon(config_of(template, args)) as daemon:
            gaps = asyncio.run(measure(daemon, args))
        found[template] = gaps.figures()
        told = "  ".join(f"{name} {value:.2f}" for name, value in found[template].items())
        print(f"{template}: {told}  ({len(gaps.steady)} + {len(gaps.arrival)} gaps)", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
