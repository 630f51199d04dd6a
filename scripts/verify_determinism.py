#!/usr/bin/env python3
"""Does a seed give the same text whatever else the server computes? Seeded requests alone, then together.

    python scripts/verify_determinism.py                                  # a daemon of its own
    python scripts/verify_determinism.py --url http://127.0.0.1:1025      # a running one
    python scripts/verify_determinism.py --dtype float32 --speed 1,8,32   # and what seeds cost

Prompts have 5 to 300 words, all different; temperature is 1. Without --url further daemons do what could
change a text: one has a cache so small that running requests are preempted and computed again, one swaps them
out instead, one computes prompts in pieces beside running requests, one finds prompts in its prefix cache,
one guesses what comes next. Exit code 1 when any text differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import ssl
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from own_daemon import HOST, NAME, TINY_MODEL, configuration, own_daemon

Json = dict[str, Any]

_WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "river",
    "small",
    "old",
    "king",
    "went",
    "to",
    "see",
    "and",
    "her",
)
_SHORTEST, _LONGEST = 5, 300  # words of a prompt
_TIMEOUT_S = 600.0
_PROGRESS_S = 10.0
_SPEED_ROUNDS = 5


class Client:
    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._context = context

    def complete(self, body: Json) -> str:
        """The text. Raises OSError when the server refuses or cannot be reached."""
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
        return text

    def together(self, bodies: Sequence[Json], streams: int, phase: str = "") -> list[str]:
        """All of them, `streams` at a time; `phase` names them in lines of progress."""
        start = told = time.monotonic()
        texts = []
        with ThreadPoolExecutor(streams) as pool:
            for text in pool.map(self.complete, bodies):
                texts.append(text)
                if phase and (now := time.monotonic()) - told > _PROGRESS_S:
                    told = now
                    print(f"{phase}: {len(texts)} of {len(bodies)} after {now - start:.0f} s", flush=True)
        return texts


def seeded_bodies(count: int, model: str, max_tokens: int) -> list[Json]:
    """Requests of different lengths and seeds, the same in every run."""
    source = random.Random(1)
    return [
        {
            "model": model,
            "prompt": " ".join(source.choices(_WORDS, k=source.randint(_SHORTEST, _LONGEST))),
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


def compare(phase: str, client: Client, bodies: Sequence[Json], streams: int, want: Sequence[str]) -> int:
    """Print how many texts differ from those wanted, and return it."""
    got = client.together(bodies, streams, phase)
    different = sum(a != b for a, b in zip(got, want, strict=True))
    print(f"{phase}: {len(want) - different} equal, {different} different", flush=True)
    return different


def tokens_per_second(client: Client, bodies: Sequence[Json], streams: int) -> float:
    start = time.perf_counter()
    client.together(bodies, streams)
    return sum(body["max_tokens"] for body in bodies) / (time.perf_counter() - start)


def measure_speed(client: Client, model: str, max_tokens: int, streams: Sequence[int]) -> None:
    """Print tokens/s with and without seeds, taken in turn; medians."""
    for width in streams:
        bodies = seeded_bodies(max(4, 2 * width), model, max_tokens)
        unseeded = [{key: value for key, value in body.items() if key != "seed"} for body in bodies]
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(_SPEED_ROUNDS):
            for seeded in (False, True):
                rates[seeded].append(tokens_per_second(client, bodies if seeded else unseeded, width))
        without, seeded_rate = statistics.median(rates[False]), statistics.median(rates[True])
        ratio = statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True))
        print(
            f"{width} streams: {without:.0f} tok/s without seeds, {seeded_rate:.0f} with, ratio {ratio:.2f}",
            flush=True,
        )


@dataclass(frozen=True, slots=True)
class Way:
    """A configuration in which texts are made in another way; `counter` tells that it happened."""

    name: str
    counter: str  # a metric
    small_cache: bool = False
    schedule: Mapping[str, Any] = field(default_factory=dict)
    plugin: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1


_PREEMPTIONS = "num_preemptions_total"
_GUESSING = {"plugin_type": "memory_decoding", "decoding_length": 16, "dynamic_algo": True}
_SWAPPING = {"maxPreemptCount": 8}
_IN_PIECES = {"templateType": "Mix", "prefillChunkSize": 48}
WAYS = (
    Way("with a small cache", _PREEMPTIONS, small_cache=True),
    Way("swapped out", _PREEMPTIONS, small_cache=True, schedule=_SWAPPING, model={"cpuMemSize": 1}),
    Way("in pieces", "prompt_tokens_total", schedule=_IN_PIECES, plugin={"plugin_type": "splitfuse"}),
    Way("with a prefix cache", "npu_radix_match_hit_num", plugin={"plugin_type": "prefix_cache"}, rounds=2),
    Way("guessing", "mindie_right_guesses_total", plugin=_GUESSING),
)


@contextlib.contextmanager
def started(
    model: Path, runtime: Mapping[str, Any], way: Way | None = None, small_cache: int = 0
) -> Iterator[Client]:
    """A daemon of this script's own, with these members of runtimeConfig."""
    changes: Json = {"BackendConfig": {"runtimeConfig": dict(runtime)}}
    if way is not None:
        backend = changes["BackendConfig"]
        backend["ScheduleConfig"] = {"cacheBlockSize": 16, **way.schedule}
        backend["ModelDeployConfig"] = {"speculationGamma": 16}
        if way.small_cache:  # as many tokens as in blocks of 128
            backend["runtimeConfig"]["kvCacheBlockNum"] = 8 * small_cache
    config = configuration(changes, mock=False, model=model)
    if way is not None:
        members = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
        members |= {"plugin_params": dict(way.plugin), **way.model}
    with own_daemon(config) as daemon:
        yield Client(f"http://{HOST}:{daemon.port}", None)
        if way is not None:
            print(f"{way.counter}: {counted(config['ServerConfig']['metricsPort'], way.counter)}", flush=True)


def counted(metrics_port: int, metric: str) -> int:
    """As the daemon itself tells."""
    with urllib.request.urlopen(f"http://{HOST}:{metrics_port}/metrics", timeout=_TIMEOUT_S) as answer:
        found = re.search(rf"^{metric}(?:{{.*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else 0


def tls_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not args.url.startswith("https:"):
        return None
    context = ssl.create_default_context(cafile=args.cacert)
    if args.cert:
        context.load_cert_chain(args.cert, args.key)
    return context


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running server; without it the script starts its own")
    parser.add_argument("--cacert", help="PEM file that signed the server's certificate")
    parser.add_argument("--cert", help="PEM file of the client's certificate")
    parser.add_argument("--key", help="PEM file of its key")
    parser.add_argument("--served-model", default=NAME, help=f"name in the requests ({NAME})")
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="directory, for a daemon of its own")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of its own daemon; 0: one per core")
    parser.add_argument("--requests", type=int, default=48, help="how many (48)")
    parser.add_argument("--streams", type=int, default=16, help="how many at a time when together (16)")
    parser.add_argument("--max-tokens", type=int, default=100, help="of each (100)")
    parser.add_argument(
        "--small-cache", type=int, default=24, metavar="BLOCKS", help="of 128 tokens, where it is small (24)"
    )
    parser.add_argument("--speed", default="", metavar="N,N", help="also measure speed with so many streams")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0: all equal; 1: some differ; 2: no server to ask."""
    args = parse_args(argv)
    bodies = seeded_bodies(args.requests, args.served_model, args.max_tokens)
    streams = [int(width) for width in args.speed.split(",") if width]
    runtime = {"dtype": args.dtype, "cpuThreads": args.threads}
    server = (
        contextlib.nullcontext(Client(args.url, tls_context(args)))
        if args.url
        else started(args.model, runtime)
    )
    different = 0
    try:
        with server as client:
            alone = client.together(bodies, 1, "alone")
            different += compare("together", client, bodies, args.streams, alone)
            different += compare("and in the other order", client, bodies[::-1], args.streams, alone[::-1])
            measure_speed(client, args.served_model, args.max_tokens, streams)
        for way in () if args.url else WAYS:
            with started(args.model, runtime, way, args.small_cache) as client:
                for _ in range(way.rounds):
                    different += compare(way.name, client, bodies, args.streams, alone)
    except (OSError, RuntimeError) as error:
        print(f"cannot verify: {error}", file=sys.stderr)
        return 2
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
