#!/usr/bin/env python3
"""How evenly two or more instances are used, and how much of what begins alike is computed once only.

    python scripts/bench_instances.py --instances 2

Starts a daemon of its own for each load, with the prefix cache on, one thread per worker, and a cache that
holds an instance's share of the conversations but not all of them:

    skewed         one prompt in eight is 50 times as long as the others, all different
    conversations  each turn's prompt is the one before with some tokens more; in another order in each round
    one beginning  all prompts begin with the same tokens

Told of each: processor seconds of the workers, the busiest over their mean, and the share of the prompts'
tokens that the caches had. Times are processor times, so other load on the machine matters little.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_serving import Target, random_prompts, read_answer, usable_ids
from own_daemon import HOST, NAME, TINY_MODEL, OwnDaemon, configuration, own_daemon

_MAX_SEQ_LEN = 2048
_BLOCK = 16
_TALK = 960  # tokens of a conversation's first prompt, and of what all prompts begin with
_MORE = 32  # tokens by which they get longer
_TURNS = 4  # of each
_SETTLES_S = 1.2  # an engine tells its numbers once a second
LOADS = ("skewed", "conversations", "one_beginning")
_METRICS = {"looked up": "all_radix_match_num", "found": "npu_radix_match_hit_num"}

Ask = Callable[[Sequence[int]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Result:
    seconds: list[float]  # processor time of each worker
    looked_up: int  # tokens of prompts
    found: int  # of them, in a cache

    @property
    def imbalance(self) -> float:
        """The busiest worker over the mean; 1 when all have done the same."""
        return max(self.seconds) * len(self.seconds) / sum(self.seconds)


class Loads:
    """`--requests` prompts of each kind, by `--clients` at once."""

    def __init__(self, args: argparse.Namespace, ids: Sequence[int]) -> None:
        """`ids`: what prompts are made of."""
        self._args = args
        self._ids = ids
        self._seeds = count(args.seed)

    def _fresh(self, length: int) -> list[int]:
        return next(random_prompts(self._ids, length, next(self._seeds)))

    async def skewed(self, ask: Ask) -> None:
        prompts = [self._fresh(1600 if n % 8 == 0 else 32) for n in range(self._args.requests)]
        await self._by_clients(ask, prompts)

    async def conversations(self, ask: Ask) -> None:
        talks = [self._fresh(_TALK) for _ in range(self._args.requests // _TURNS)]
        for _ in range(_TURNS):
            talks.sort(key=lambda talk: talk[-1])  # anew by chance: clients that think come back in no order
            await self._by_clients(ask, talks)
            for talk in talks:
                talk += self._fresh(_MORE)

    async def one_beginning(self, ask: Ask) -> None:
        shared = self._fresh(_TALK)
        await self._by_clients(ask, [[*shared, *self._fresh(_MORE)] for _ in range(self._args.requests)])

    async def _by_clients(self, ask: Ask, prompts: Sequence[Sequence[int]]) -> None:
        left = iter(prompts)

        async def one() -> None:
            for prompt in left:
                await ask(prompt)

        await asyncio.gather(*(one() for _ in range(self._args.clients)))


async def measure(daemon: OwnDaemon, metrics_port: int, load: Callable[[Ask], Awaitable[None]],
                  output: int) -> Result:  # fmt: skip
    target = Target(urlsplit(f"http://{HOST}:{daemon.port}"), None, 600.0)

    async def ask(prompt: Sequence[int]) -> None:
        body = {
            "model": NAME, "prompt": list(prompt), "max_tokens": output, "temperature": 0, "stream": True,
            "ignore_eos": True,
        }  # fmt: skip
        connection = await target.connect()
        answer = read_answer(*await connection.exchange(target.request(body)))
        connection.close()
        if answer.error:
            raise RuntimeError(f"a request failed: {answer.error}")

    workers = [child for child in psutil.Process(daemon.pid).children() if child.pid != daemon.endpoint.pid]
    before = [_processor_s(worker) for worker in workers]
    await load(ask)
    seconds = [_processor_s(worker) - was for worker, was in zip(workers, before, strict=True)]
    await asyncio.sleep(_SETTLES_S)
    counted = _read_metrics(metrics_port)
    return Result(seconds, counted["looked up"], counted["found"])


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _read_metrics(port: int) -> dict[str, int]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}
    return {name: int(values[metric]) for name, metric in _METRICS.items()}


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    longest = -(-(_TALK + _MORE * _TURNS + args.output) // _BLOCK)
    blocks = longest * (args.requests // _TURNS) * 4 // (args.instances * 3)  # a share and a third
    blocks = max(blocks, 3 * _MAX_SEQ_LEN // _BLOCK)
    config = configuration(
        {
            "BackendConfig": {
                "modelInstanceNumber": args.instances,
                "npuDeviceIds": [[number] for number in range(args.instances)],
                "ModelDeployConfig": {"maxSeqLen": _MAX_SEQ_LEN, "maxInputTokenLen": _MAX_SEQ_LEN - 1},
                "ScheduleConfig": {
                    "cacheBlockSize": _BLOCK, "maxPrefillTokens": 4 * _MAX_SEQ_LEN, "maxIterTimes": 512,
                },
                "runtimeConfig": {"cpuThreads": 1, "kvCacheBlockNum": blocks},
            }
        },
        mock=False,
        model=args.model,
    )  # fmt: skip
    model = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    model["plugin_params"] = json.dumps({"plugin_type": "prefix_cache"})
    return config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="a model directory")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--requests", type=int, default=64, help="of each load")
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--load", choices=LOADS, help="this one alone")
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    document = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    loads = Loads(args, usable_ids(None, document["vocab_size"]))
    print("| load | processor s of each worker | busiest / mean | found in a cache |\n|---|---|---|---|")
    for name in [args.load] if args.load else LOADS:
        config = config_of(args)
        with own_daemon(config) as daemon:
            port = config["ServerConfig"]["metricsPort"]
            result = asyncio.run(measure(daemon, port, getattr(loads, name), args.output))
        seconds = ", ".join(f"{used:.1f}" for used in result.seconds)
        share = result.found / result.looked_up
        print(
            f"| {name} | {seconds} | {result.imbalance:.2f} | {share:.0%} of {result.looked_up} |", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
