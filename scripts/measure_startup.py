#!/usr/bin/env python3
"""How long a start takes, phase by phase, and what each process then holds: medians of several starts.

    python scripts/measure_startup.py --times 5
    python scripts/measure_startup.py --model /models/qwen2.5-0.5b

Daemons of its own are started one after the other, over plain HTTP. Phases are read off the time stamps of
their logs. The endpoint imports and loads its tokenizer while the worker does the rest, so its row tells only
what it needs beyond. Memory is read from /proc once the service serves, before any request: RSS counts the
pages a process shares with others in full, PSS by its share.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from bench_serving import positive_int
from footprint import Footprint, footprints
from own_daemon import TINY_MODEL, configuration, own_daemon

_LINE = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3})\].*?\] : (.*)$", re.MULTILINE)
# what a phase is -> the line that ends it; the last one that matches counts
PHASES = {
    "interpreter, configuration": r"configuration .* worker\(s\)",
    "forks": r"role=.* started",
    "imports, headers of the weights": r"role=worker.*: weights \d+ %",
    "weights": r"role=worker.*: weights 100 %",
    "cache, warm-up": r"role=worker.*: warm-up 100 %",
    "worker ready": r"role=worker.* ready: ",
    "endpoint ready": r"role=endpoint.* ready: ",
}
_FIRST = {"imports, headers of the weights"}  # of which the first matching line counts
_MIB = 2**20


def phase_ends(log: str) -> dict[str, float]:
    """Phase -> when it ended, in seconds since the epoch; phases without a line are left out."""
    found: dict[str, float] = {}
    for stamp, text in _LINE.findall(log):
        for phase, pattern in PHASES.items():
            if re.match(pattern, text) and not (phase in _FIRST and phase in found):
                found[phase] = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S.%f").timestamp()
    return found


def durations(began: float, ends: Mapping[str, float]) -> dict[str, float]:
    """Phase -> seconds, in the order in which they ended; `total` is the last."""
    if "endpoint ready" not in ends:
        raise ValueError("the log does not say when the endpoint was ready; INFO has to reach it")
    taken: dict[str, float] = {}
    before = began
    for phase, end in sorted(ends.items(), key=lambda item: (item[1], list(PHASES).index(item[0]))):
        taken[phase], before = end - before, end
    return {**taken, "total": before - began}


def start_once(model: Path, *, mock: bool) -> tuple[dict[str, float], dict[str, Footprint]]:
    began = time.time()
    with own_daemon(configuration({}, mock=mock, model=model)) as daemon:
        held = footprints(daemon.pid)
        log = daemon.log_file.read_text(encoding="utf-8")
    return durations(began, phase_ends(log)), held


def phase_table(runs: Sequence[Mapping[str, float]]) -> str:
    lines = ["| phase | median | least | most |", "|---|---|---|---|"]
    for phase in (*PHASES, "total"):
        if seconds := [run[phase] for run in runs if phase in run]:
            columns = (statistics.median(seconds), min(seconds), max(seconds))
            lines.append(f"| {phase} | {' | '.join(f'{value:.2f} s' for value in columns)} |")
    return "\n".join(lines)


def memory_table(runs: Sequence[Mapping[str, Footprint]]) -> str:
    lines = ["| process | RSS | PSS | descriptors | threads |", "|---|---|---|---|---|"]
    for role in runs[0]:
        held = [run[role] for run in runs if role in run]
        rss, pss = (
            statistics.median(values) / _MIB for values in ([h.rss for h in held], [h.pss for h in held])
        )
        counts = [
            statistics.median(values) for values in ([h.descriptors for h in held], [h.threads for h in held])
        ]
        lines.append(f"| {role} | {rss:.1f} MiB | {pss:.1f} MiB | {counts[0]:.0f} | {counts[1]:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--times", type=positive_int, default=5, help="starts to take the medians of (5)")
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="model directory (mindie-tiny)")
    parser.add_argument("--mock", action="store_true", help="StandardMock, which needs no weights")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    os.environ["MINDIE_LOG_LEVEL"] = "INFO"
    runs = [start_once(args.model, mock=args.mock) for _ in range(args.times)]
    what = "StandardMock" if args.mock else args.model.name
    print(f"{what}, {args.times} starts, {os.cpu_count()} cores\n")
    print(phase_table([phases for phases, _ in runs]))
    print()
    print(memory_table([held for _, held in runs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
