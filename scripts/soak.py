#!/usr/bin/env python3
"""Serve a mixed load for hours and see whether anything grows, slows down or gets lost.

    python scripts/soak.py --minutes 60
    python scripts/soak.py --minutes 3 --calibrate 15 --warm-up 0.5 --mock

A daemon is started for it. For --calibrate seconds a closed loop measures how many requests a second it can
serve; then requests arrive at random at --load of that rate, in all dialects, whole and streamed, some bound
to a format; some clients hang up, some read slowly, some send spoilt bodies. Processes are sampled every
--interval seconds. After a warm-up part (caches fill to their bounds, those of grammars even before the load;
threads keep their largest buffers) the resident set of each process gets a slope by Theil and Sen, with its
95 % range. It is told and judged without /dev/shm: the rings there are allocated at the start, and a page of
them counts from its first use on, which is the first time that the other side was so far behind.

Ends with 1 when a request was lost, when the server's counters tell another story than the ledger, when
descriptors grew, or when a slope is over the limit and not by chance (its range does not include 0).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from footprint import Footprint, footprints, shared_memory_in_use
from fuzz_cases import NAME
from ledger import Ending, Fate, Ledger, Manner, disagreements, percentile, read_counters
from own_daemon import OwnDaemon, configuration, own_daemon
from traffic import Lines, Load, Mix, closing
from traffic_requests import Ask

LIMITS = {
    "ServerConfig": {"maxRequestLength": 2},
    "BackendConfig": {
        # spoilt bodies that ask for much are not to be most of the work
        "ScheduleConfig": {"maxIterTimes": 128, "maxN": 8},
        "ModelDeployConfig": {"maxSeqLen": 1024, "maxInputTokenLen": 512},
        # a cache of which every block is soon in use: pages count as resident once they have been written
        "runtimeConfig": {"kvCacheBlockNum": 256},
    },
}
CLIENTS = 12  # of the closed loop that measures the capacity
GRAMMARS = 300  # more than a worker keeps compiled
ALL_READ = Mix(hang_up=0, slow=0, spoil=0)
MORE_DESCRIPTORS = 4
_SETTLES_S = 3.0  # until the server has seen the ends of our last connections, twice its sweep of deadlines
_MIB = 2**20

# --- slopes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slope:
    """Per hour, with the range that holds it with 95 % probability were the samples independent."""

    estimate: float
    low: float
    high: float


def theil_sen(times_s: Sequence[float], values: Sequence[float]) -> Slope:
    """The median of the slopes of all pairs, per hour (Sen 1968); steps and outliers hardly move it."""
    size = len(times_s)
    slopes = sorted(
        3600 * (values[b] - values[a]) / (times_s[b] - times_s[a])
        for a in range(size)
        for b in range(a + 1, size)
    )
    if not slopes:
        return Slope(math.nan, math.nan, math.nan)
    spread = 1.96 * math.sqrt(size * (size - 1) * (2 * size + 5) / 18)  # of Kendall's S
    low, high = int((len(slopes) - spread) / 2), int((len(slopes) + spread) / 2)
    return Slope(statistics.median(slopes), slopes[max(0, low)], slopes[min(len(slopes) - 1, high)])


# --- sampling ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Samples:
    """A footprint per role every few seconds; times are seconds since the load began."""

    times_s: list[float] = field(default_factory=list)
    taken: list[dict[str, Footprint]] = field(default_factory=list)
    shm: list[int] = field(default_factory=list)

    def series(self, role: str, since_s: float) -> tuple[list[float], list[Footprint]]:
        rows = [
            (when, by_role[role])
            for when, by_role in zip(self.times_s, self.taken, strict=True)
            if when >= since_s and role in by_role
        ]
        return [when for when, _ in rows], [one for _, one in rows]

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(role for by_role in self.taken for role in by_role))


async def sample(daemon: OwnDaemon, samples: Samples, start: float, interval_s: float) -> None:
    """Runs until it is cancelled."""
    while True:
        taken = await asyncio.to_thread(footprints, daemon.pid)
        samples.times_s.append(time.monotonic() - start)
        samples.taken.append(taken)
        samples.shm.append(shared_memory_in_use())
        await asyncio.sleep(interval_s)


# --- a run ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """What the load left behind."""

    capacity: float  # requests per second
    rate: float
    start: float  # monotonic seconds: when the load began
    warm_up_s: float
    seconds: float
    ledger: Ledger
    samples: Samples
    idle_before: Mapping[str, Footprint]
    idle_after: Mapping[str, Footprint]
    disagreements: list[str]


def _fresh_grammar(numbers: Iterator[int]) -> Ask:
    """A request whose schema no other has."""
    number = next(numbers)
    schema = {
        "type": "object",
        "properties": {f"day_{number}": {"type": "integer"}},
        "required": [f"day_{number}"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "plan", "schema": schema, "strict": True}}
    body = {"model": NAME, "prompt": "Once", "max_tokens": 4, "response_format": form}
    return Ask("completions", "/v1/completions", json.dumps(body), False)


async def _fill_grammar_caches(lines: Lines) -> None:
    """Spoilt schemas are new grammars, some dozens an hour: filling up would look like growing."""
    numbers = itertools.count()
    load = Load(lines, Ledger(), ALL_READ, 0, lambda _: _fresh_grammar(numbers))
    for _ in range(GRAMMARS // CLIENTS):
        await asyncio.gather(*(load.one() for _ in range(CLIENTS)))
    if failed := [ending.detail for ending in load.ledger.endings if ending.fate is not Fate.FINISHED]:
        raise SystemExit(f"{len(failed)} of {GRAMMARS} requests with a schema failed: {failed[0]}")


async def _run(daemon: OwnDaemon, metrics_port: int, args: argparse.Namespace) -> Run:
    with closing(Lines(daemon.port)) as lines:
        if not args.mock:
            await _fill_grammar_caches(lines)
        trial = Load(lines, Ledger(), ALL_READ, args.seed)
        await trial.closed(CLIENTS, args.calibrate / 4)  # kernels and caches that the first requests pay for
        capacity = await trial.closed(CLIENTS, args.calibrate)
        typical = percentile((ending.ended - ending.sent for ending in trial.ledger.endings), 0.5) / 2
    rate = capacity * args.load
    print(
        f"capacity {capacity:.1f} requests/s with {CLIENTS} clients; load {rate:.1f} requests/s", flush=True
    )
    await asyncio.sleep(_SETTLES_S)
    before, idle_before = read_counters(metrics_port), footprints(daemon.pid)

    ledger, samples, start = Ledger(), Samples(), time.monotonic()
    sampling = asyncio.create_task(sample(daemon, samples, start, args.interval))
    telling = asyncio.create_task(_tell(ledger, args.minutes))
    with closing(Lines(daemon.port)) as lines:
        await Load(lines, ledger, Mix(typical_s=typical), args.seed).paced(rate, args.minutes * 60)
    seconds = time.monotonic() - start
    for task in (sampling, telling):
        task.cancel()
    await asyncio.gather(sampling, telling, return_exceptions=True)
    await asyncio.sleep(_SETTLES_S)
    after, idle_after = read_counters(metrics_port), footprints(daemon.pid)
    return Run(
        capacity, rate, start, args.warm_up * 60, seconds, ledger, samples, idle_before, idle_after,
        disagreements(ledger, before, after),
    )  # fmt: skip


async def _tell(ledger: Ledger, minutes: float) -> None:
    start = time.monotonic()
    while True:
        await asyncio.sleep(60)
        print(
            f"{(time.monotonic() - start) / 60:.0f} of {minutes:g} min: {ledger.sent} sent, "
            f"{ledger.open} open, {len(ledger.lost)} lost",
            flush=True,
        )


# --- what it says --------------------------------------------------------------------------------------


def memory_table(run: Run) -> str:
    """Markdown: a row per role."""
    lines = [
        "| process | RSS first | RSS last | slope, MiB/h (95 % range) | PSS last | beside it in /dev/shm | "
        "descriptors idle | threads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for role in run.samples.roles:
        times, taken = run.samples.series(role, run.warm_up_s)
        if len(taken) < 2:
            continue
        slope = theil_sen(times, [one.own / _MIB for one in taken])
        idle = [side[role].descriptors if role in side else "-" for side in (run.idle_before, run.idle_after)]
        lines.append(
            f"| {role} | {taken[0].own / _MIB:.1f} | {taken[-1].own / _MIB:.1f} | {slope.estimate:+.2f} "
            f"({slope.low:+.2f} to {slope.high:+.2f}) | {taken[-1].pss / _MIB:.1f} | "
            f"{taken[-1].shared / _MIB:.1f} | {idle[0]} -> {idle[1]} | "
            f"{taken[0].threads} -> {taken[-1].threads} |"
        )
    return "\n".join(lines)


def quarters(run: Run) -> tuple[list[Ending], list[Ending]]:
    """Plainly read, finished requests of the first and of the last quarter after the warm-up."""
    read = [e for e in run.ledger.endings if e.manner is Manner.READS and e.fate is Fate.FINISHED]
    quarter = (run.seconds - run.warm_up_s) / 4
    first, last = run.start + run.warm_up_s + quarter, run.start + run.seconds - quarter
    return [e for e in read if first - quarter <= e.sent < first], [e for e in read if e.sent >= last]


def latency_table(run: Run) -> str:
    lines = ["| | first quarter | last quarter | drift |", "|---|---|---|---|"]
    sides = quarters(run)
    firsts = [
        [e.first - e.sent for e in side if e.first is not None and e.ask and e.ask.stream] for side in sides
    ]
    lasts = [[e.ended - e.sent for e in side] for side in sides]
    for name, times in (("first byte of streams", firsts), ("last byte", lasts)):
        for share in (0.5, 0.99):
            first, last = (percentile(side, share) * 1e3 for side in times)
            lines.append(
                f"| {name} p{share * 100:.0f} | {first:.0f} ms | {last:.0f} ms | {last / first - 1:+.0%} |"
            )
    return "\n".join([*lines, f"| requests | {len(sides[0])} | {len(sides[1])} | |"])


def findings(run: Run, most_mib_per_h: float) -> list[str]:
    """Everything that makes the run a failure."""
    found = [
        f"lost: {e.dialect}, client {e.manner.value}, {e.ended - e.sent:.1f} s after it was sent, at "
        f"{e.sent - run.start:.0f} s: {e.detail}"
        for e in run.ledger.lost
    ]
    found += run.disagreements
    if run.ledger.open:
        found.append(f"{run.ledger.open} requests without an end")
    for role in run.samples.roles:
        times, taken = run.samples.series(role, run.warm_up_s)
        slope = theil_sen(times, [one.own / _MIB for one in taken])
        if slope.estimate > most_mib_per_h and slope.low > 0:
            found.append(f"{role}: its resident set grows by {slope.estimate:.1f} MiB/h")
        if role in run.idle_before and role in run.idle_after:
            more = run.idle_after[role].descriptors - run.idle_before[role].descriptors
            if more > MORE_DESCRIPTORS:
                found.append(f"{role}: {more} descriptors more than before the load")
    return found


def report(run: Run, args: argparse.Namespace) -> str:
    shm = run.samples.shm
    errors = [e.detail for e in run.ledger.endings if e.fate is Fate.ERROR]
    return "\n".join(
        [
            "",
            f"{run.seconds / 60:.1f} min at {args.load:.0%} of {run.capacity:.1f} requests/s "
            f"({'StandardMock' if args.mock else 'mindie-tiny'}, seed {args.seed}), "
            f"warm-up {args.warm_up:g} min, {len(run.samples.taken)} samples, {os.cpu_count()} cores",
            "",
            run.ledger.table(),
            "",
            memory_table(run),
            "",
            latency_table(run),
            "",
            f"/dev/shm of the machine: {shm[0] / _MIB:.1f} -> {shm[-1] / _MIB:.1f} MiB",
            *(f"error: {detail}" for detail in errors[:5]),
        ]
    )


def write_samples(file: Path, samples: Samples) -> None:
    taken: list[dict[str, Any]] = [
        {"s": when, "shm": shm, **{role: asdict(one) for role, one in by_role.items()}}
        for when, shm, by_role in zip(samples.times_s, samples.shm, samples.taken, strict=True)
    ]
    file.write_text(json.dumps(taken), encoding="utf-8")


# --- command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of load (60)")
    parser.add_argument("--load", type=float, default=0.5, help="share of the measured capacity (0.5)")
    parser.add_argument(
        "--calibrate", type=float, default=60.0, help="seconds to measure the capacity in (60)"
    )
    parser.add_argument("--warm-up", type=float, help="minutes left out of slopes (a sixth, at most 15)")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two samples (10)")
    parser.add_argument("--most-mib-per-hour", type=float, default=1.0, help="slope that is a failure (1)")
    parser.add_argument("--mock", action="store_true", help="StandardMock instead of mindie-tiny")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other requests (0)")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write all samples to a JSON file")
    args = parser.parse_args(argv)
    if args.warm_up is None:
        args.warm_up = min(15.0, args.minutes / 6)
    if not (args.minutes > args.warm_up >= 0 and args.load > 0 and args.calibrate > 0 and args.interval > 0):
        parser.error(
            "--minutes has to be more than --warm-up, and --load, --calibrate and --interval more than 0"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    config = configuration(LIMITS, mock=args.mock)
    with own_daemon(config) as daemon:
        run = asyncio.run(_run(daemon, config["ServerConfig"]["metricsPort"], args))
        log = daemon.log_file.read_bytes()
    if args.samples is not None:
        write_samples(args.samples, run.samples)
    print(report(run, args))
    found = findings(run, args.most_mib_per_hour)
    if b"Traceback" in log:
        found.append(
            "the log has a traceback: " + log[log.index(b"Traceback") :][:2000].decode("utf-8", "replace")
        )
    print("\n" + ("\n".join(f"FAILED: {finding}" for finding in found) or "nothing lost, nothing grew"))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
