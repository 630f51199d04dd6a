#!/usr/bin/env python3
"""What the prefix cache saves: first token of a prompt whose beginning is new, and of one that shares it.

    python scripts/bench_prefix.py --model /tmp/random-0.5b

Starts a daemon of its own. Each repeat asks twice with `--shared` tokens nobody has sent before and `--own`
tokens behind them that differ; nothing else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_serving import Target, random_prompts, read_answer, usable_ids
from own_daemon import HOST, NAME, OwnDaemon, configuration, own_daemon


async def measure(daemon: OwnDaemon, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds to the first token, of the first request of each repeat and of the second."""
    target = Target(urlsplit(f"http://{HOST}:{daemon.port}"), None, 600.0)
    connection = await target.connect()

    async def first_token(prompt: list[int]) -> float:
        body = {"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
        answer = read_answer(*await connection.exchange(target.request(body)))
        if answer.error:
            raise RuntimeError(f"a request failed: {answer.error}")
        return answer.frames[0] - answer.sent

    ids = usable_ids(None, args.vocab_size)
    shared = random_prompts(ids, args.shared, args.seed)
    own = random_prompts(ids, args.own, args.seed + 1)
    cold, warm = [], []
    for _ in range(args.repeats + 1):
        prefix = next(shared)
        cold.append(await first_token([*prefix, *next(own)]))
        warm.append(await first_token([*prefix, *next(own)]))
    connection.close()
    return cold[1:], warm[1:]  # without the first pair, which prepares kernels


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    room = args.shared + args.own + 512
    config = configuration(
        {
            "BackendConfig": {
                "ModelDeployConfig": {"maxSeqLen": room, "maxInputTokenLen": room - 1},
                "ScheduleConfig": {"maxPrefillTokens": room, "maxIterTimes": 16},
                "runtimeConfig": {"cpuThreads": args.threads},
            }
        },
        mock=False,
        model=args.model,
    )
    model = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    model["plugin_params"] = json.dumps({"plugin_type": "prefix_cache"})
    return config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--shared", type=int, default=1024, help="tokens that two prompts have in common")
    parser.add_argument("--own", type=int, default=16, help="tokens behind them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="cpuThreads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    document = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    args.vocab_size = document["vocab_size"]
    with own_daemon(config_of(args)) as daemon:
        cold, warm = (statistics.median(found) for found in asyncio.run(measure(daemon, args)))
    print(
        f"first token after {args.shared} shared and {args.own} own tokens, medians of {args.repeats}: "
        f"cold {cold * 1e3:.1f} ms, warm {warm * 1e3:.1f} ms, {cold / warm:.1f} times sooner"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
