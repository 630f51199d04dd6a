#!/usr/bin/env python3
"""Break a serving daemon again and again under load, and see that every request still ends in one way.

    python scripts/chaos.py --minutes 10
    python scripts/chaos.py --measure 5 --faults worker-kill,endpoint-kill

A daemon is started for it, with mindie-tiny or (--mock) StandardMock. Its capacity is measured for
--calibrate seconds; then requests arrive at --load of that, greedy ones whose text is known from before,
while faults of --faults happen at random moments, one after the other: the next one when the service serves
again, and never more than four deaths in a minute, since the fifth ends the service by design. All the time
some clients hang up, read slowly or send spoilt bodies.

Per fault: after what time `ready` was no longer 200 (a probe every 25 ms), after what time a new request was
answered, and what became of the requests under way: continued with the text they always have, ended with an
error, dropped (their connection ended with the endpoint that had it), or cut. --measure N does each fault N
times and prints the medians.

Ends with 1 when a request was cut or lost, when a text was another one, when the service did not serve again,
or when the ledger does not add up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil
from chaos_faults import FAULTS, Fault, Target, handles_reload
from fuzz_cases import HOST, NAME
from ledger import Ending, Fate, Ledger, Manner, percentile
from own_daemon import OwnDaemon, configuration, own_daemon
from traffic import Lines, Load, Mix, closing, exchange
from traffic_requests import Ask, greedy_ask

LIMITS = {
    "ServerConfig": {"maxRequestLength": 2},
    "BackendConfig": {
        "ScheduleConfig": {"maxIterTimes": 256, "maxN": 8},
        "ModelDeployConfig": {"maxSeqLen": 1024, "maxInputTokenLen": 512},
        "runtimeConfig": {"kvCacheBlockNum": 256},
    },
}
PING = Ask(
    "completions",
    "/v1/completions",
    json.dumps({"model": NAME, "prompt": "Once", "max_tokens": 1, "stream": True}),
    stream=True,
)
ASKS = 32  # different requests, each with a known text
TOKENS = (64, 200)  # of an answer: long enough to be under way when something breaks
CLIENTS = 12  # of the closed loop that measures the capacity
PROBE_EVERY_S = 0.025
PROBE_WITHIN_S = 0.5  # no answer by then counts as not ready
MOST_DEATHS = 4
DEATHS_PER_S = 60.0
DETECTED_WITHIN_S = 5.0
SERVED_WITHIN_S = 120.0
QUIET_S = (1.0, 5.0)  # between two faults

# --- probing -------------------------------------------------------------------------------------------


async def ready_status(port: int) -> int:
    """Of /v2/health/ready; 0 when no answer comes."""
    writer = None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(HOST, port), PROBE_WITHIN_S)
        writer.write(b"GET /v2/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        line = await asyncio.wait_for(reader.readline(), PROBE_WITHIN_S)
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    except (OSError, asyncio.TimeoutError):
        return 0
    finally:
        if writer is not None:
            writer.transport.abort()


@dataclass(slots=True)
class Probes:
    """When `ready` was asked (monotonic seconds) and what it said."""

    port: int
    seen: list[tuple[float, int]] = field(default_factory=list)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            asked = time.monotonic()
            self.seen.append((asked, await ready_status(self.port)))
            await asyncio.sleep(max(0.0, asked + PROBE_EVERY_S - time.monotonic()))

    def first_not_ready(self, since: float) -> float | None:
        return next((asked for asked, status in self.seen if asked >= since and status != 200), None)

    @property
    def ready(self) -> bool:
        return bool(self.seen) and self.seen[-1][1] == 200


# --- a run ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Happened:
    """One fault and what it did. Times are monotonic seconds."""

    fault: Fault
    at: float
    not_ready: float | None = None
    served: float | None = None
    wrong: str = ""


@dataclass(slots=True)
class Chaos:
    target: Target
    lines: Lines
    probes: Probes
    happened: list[Happened] = field(default_factory=list)
    _deaths: deque[float] = field(default_factory=deque)

    async def do(self, fault: Fault) -> Happened:
        """One fault, seen through until the service serves again."""
        await self._may_die(fault.deaths)
        one = Happened(fault, time.monotonic())
        self.happened.append(one)
        self.target.struck_at = one.at
        try:
            await fault.inject(self.target)
        except (RuntimeError, psutil.Error) as error:
            one.wrong = str(error)
        one.at = self.target.struck_at
        if fault.deaths:
            self._deaths.append(time.monotonic())
            until = time.monotonic() + DETECTED_WITHIN_S
            while self.probes.first_not_ready(one.at) is None and time.monotonic() < until:
                await asyncio.sleep(PROBE_EVERY_S)
        await self._see_served(one)
        not_ready = self.probes.first_not_ready(one.at)
        if not_ready is not None and not_ready < (one.served or math.inf):
            one.not_ready = not_ready
        return one

    async def _may_die(self, deaths: int) -> None:
        while self._deaths and time.monotonic() - self._deaths[0] > DEATHS_PER_S:
            self._deaths.popleft()
        if deaths and len(self._deaths) + deaths > MOST_DEATHS:
            await asyncio.sleep(max(0.0, self._deaths[0] + DEATHS_PER_S - time.monotonic()) + 1.0)
            await self._may_die(deaths)

    async def _see_served(self, one: Happened) -> None:
        until = time.monotonic() + SERVED_WITHIN_S
        while time.monotonic() < until and not self.ended:
            if self.probes.ready:
                ending = await exchange(self.lines, PING, Manner.READS)
                if ending.fate is Fate.FINISHED and ending.first is not None:
                    one.served = ending.first
                    return
            await asyncio.sleep(PROBE_EVERY_S)
        late = f"no request was served within {SERVED_WITHIN_S:.0f} s"
        one.wrong = one.wrong or ("the daemon ended" if self.ended else late)

    async def at_random(self, faults: Sequence[Fault], minutes: float) -> None:
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until and not self.over:
            await asyncio.sleep(self.target.rng.uniform(*QUIET_S))
            await self.do(self.target.rng.choice(faults))

    async def each(self, faults: Sequence[Fault], times: int) -> None:
        for fault in faults:
            for _ in range(times):
                await asyncio.sleep(self.target.rng.uniform(*QUIET_S))
                if not self.over:
                    await self.do(fault)

    @property
    def ended(self) -> bool:
        """The daemon is no more."""
        return psutil.Process(self.target.daemon.pid).status() == psutil.STATUS_ZOMBIE

    @property
    def over(self) -> bool:
        """The daemon has ended, or does not come back."""
        return any(one.served is None for one in self.happened)


# what became of a request that was under way when something broke
CONTINUED, CHANGED, ERROR, DROPPED, CUT = "continued", "other text", "error", "dropped", "cut"


def under_way(one: Happened, run: Run) -> list[Ending]:
    """Requests of clients that wait for their answers, sent before the fault, ended before the next."""
    patient = (Manner.READS, Manner.READS_SLOWLY)
    until = min((other.at for other in run.happened if other.at > one.at), default=math.inf)
    return [
        ending
        for ending in run.ledger.endings
        if ending.manner in patient and ending.sent < one.at < ending.ended < until
    ]


def was_dropped(ending: Ending, happened: Sequence[Happened]) -> bool:
    """Its connection, or its attempt at one, met the death of an endpoint."""
    return ending.fate is Fate.LOST and any(
        one.fault.drops and ending.sent < (one.served or ending.ended) and ending.ended > one.at
        for one in happened
    )


def what_became(ending: Ending, texts: Mapping[Ask, str], happened: Sequence[Happened]) -> str:
    if ending.fate is Fate.LOST:
        return DROPPED if was_dropped(ending, happened) else CUT
    if ending.fate is not Fate.FINISHED:
        return ERROR
    known = ending.text if ending.ask is None else texts.get(ending.ask, ending.text)
    return CONTINUED if ending.text == known else CHANGED


async def known_texts(lines: Lines, asks: Sequence[Ask]) -> dict[Ask, str]:
    """What each says when nothing else is going on. Raises RuntimeError when one has no answer."""
    texts = {}
    for ask in asks:
        ending = await exchange(lines, ask, Manner.READS)
        if ending.fate is not Fate.FINISHED:
            raise RuntimeError(f"{ask.path} {ask.body}: {ending.fate.value} {ending.detail}")
        texts[ask] = ending.text
    return texts


def steady(texts: Mapping[Ask, str], endings: Sequence[Ending]) -> dict[Ask, str]:
    """Texts that others in the same batch did not change: a tie of two tokens may fall either way there."""
    moved = {ending.ask for ending in endings if what_became(ending, texts, ()) == CHANGED}
    return {ask: text for ask, text in texts.items() if ask not in moved}


@dataclass(slots=True)
class Run:
    rate: float
    ledger: Ledger
    happened: list[Happened]
    texts: dict[Ask, str]
    skipped: list[str]
    alive: bool


async def _run(daemon: OwnDaemon, management_port: int, args: argparse.Namespace) -> Run:
    rng = random.Random(args.seed)
    asks = [greedy_ask(rng, tokens=TOKENS) for _ in range(ASKS)]
    faults = [FAULTS[name] for name in args.faults]
    skipped = []
    if not handles_reload(daemon.pid) and FAULTS["reload"] in faults:
        faults.remove(FAULTS["reload"])
        skipped.append("reload: this daemon does not handle SIGHUP")
    with closing(Lines(daemon.port, keep=False)) as lines:
        texts = await known_texts(lines, asks)
        quiet = Load(lines, Ledger(), Mix(0, 0, 0), args.seed, make=lambda drawn: drawn.choice(asks))
        capacity = await quiet.closed(CLIENTS, args.calibrate)
        texts = steady(texts, quiet.ledger.endings)
        typical = percentile((ending.ended - ending.sent for ending in quiet.ledger.endings), 0.5) / 2
        rate = capacity * args.load
        print(
            f"capacity {capacity:.1f} requests/s with {CLIENTS} clients; load {rate:.1f} requests/s; "
            f"{len(texts)} of {ASKS} texts are the same in any batch",
            flush=True,
        )
        probes = Probes(management_port)
        chaos = Chaos(Target(daemon, rng), lines, probes)
        load = Load(lines, Ledger(), Mix(typical_s=typical), args.seed, make=lambda drawn: drawn.choice(asks))
        probing = asyncio.create_task(probes.run())
        over = asyncio.Event()
        loading = asyncio.create_task(load.paced(rate, 86400.0, running=lambda: not over.is_set()))
        await asyncio.sleep(QUIET_S[1])
        if args.measure:
            await chaos.each(faults, args.measure)
        else:
            await chaos.at_random(faults, args.minutes)
        over.set()
        await loading
        probing.cancel()
        for writer in chaos.target.left_open:
            writer.transport.abort()
        alive = await ready_status(management_port) == 200
    return Run(rate, load.ledger, chaos.happened, texts, skipped, alive)


# --- what it says --------------------------------------------------------------------------------------


def fault_table(run: Run) -> str:
    """Markdown: a row per kind of fault, medians over its occurrences."""
    columns = (CONTINUED, CHANGED, ERROR, DROPPED, CUT)
    lines = [
        f"| fault | times | ready 503 after | served again after | longest | {' | '.join(columns)} |",
        "|---" * (5 + len(columns)) + "|",
    ]
    for fault in FAULTS.values():
        ones = [one for one in run.happened if one.fault == fault]
        if not ones:
            continue
        met: Counter[str] = Counter()
        for one in ones:
            met.update(what_became(e, run.texts, run.happened) for e in under_way(one, run))
        detected = [one.not_ready - one.at for one in ones if one.not_ready is not None]
        served = [one.served - one.at for one in ones if one.served is not None]
        lines.append(
            f"| {fault.name} | {len(ones)} | {_median(detected)} | {_median(served)} | "
            f"{_seconds(max(served, default=None))} | {' | '.join(str(met[column]) for column in columns)} |"
        )
    return "\n".join(lines)


def _median(values: Sequence[float]) -> str:
    return _seconds(statistics.median(values) if values else None)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def equation(run: Run) -> tuple[str, bool]:
    """The ledger in one line, and whether it adds up."""
    ledger, fates = run.ledger, (Fate.FINISHED, Fate.ERROR, Fate.CANCELLED)
    dropped = sum(was_dropped(ending, run.happened) for ending in ledger.endings)
    refused, lost = ledger.count(Fate.REFUSED), ledger.count(Fate.LOST) - dropped
    accepted = ledger.sent - refused - dropped
    ended = ledger.count(*fates)
    parts = " + ".join(f"{ledger.count(fate)} {fate.value}" for fate in fates)
    text = f"{ledger.sent} sent - {refused} refused - {dropped} dropped = {accepted} accepted = {parts}"
    return f"{text}{f' + {lost} LOST' if lost else ''}", accepted == ended


def findings(run: Run) -> list[str]:
    found = []
    for one in run.happened:
        if one.wrong or one.served is None:
            found.append(f"{one.fault.name}: {one.wrong or 'not served again'}")
        elif one.fault.deaths and one.not_ready is None:
            found.append(f"{one.fault.name}: ready stayed 200 for {DETECTED_WITHIN_S:.0f} s")
    for ending in run.ledger.endings:
        if ending.fate is Fate.LOST and not was_dropped(ending, run.happened):
            found.append(f"{ending.dialect}, client {ending.manner.value}: {ending.detail}")
        elif (
            ending.fate is Fate.FINISHED and ending.ask in run.texts and ending.text != run.texts[ending.ask]
        ):
            found.append(f"{ending.dialect}: another text than alone: {ending.text[-80:]!r}")
    if not run.alive:
        found.append("the service is not ready at the end")
    if not equation(run)[1]:
        found.append("the ledger does not add up")
    return found


def report(run: Run, args: argparse.Namespace) -> str:
    errors = Counter(ending.detail for ending in run.ledger.endings if ending.fate is Fate.ERROR)
    return "\n".join(
        [
            "",
            f"{len(run.happened)} faults at {run.rate:.1f} requests/s "
            f"({'StandardMock' if args.mock else 'mindie-tiny'}, seed {args.seed}, {os.cpu_count()} cores)",
            *run.skipped,
            "",
            fault_table(run),
            "",
            run.ledger.table(),
            "",
            equation(run)[0],
            *(f"{count} x {detail}" for detail, count in errors.most_common(5)),
        ]
    )


# --- command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of random faults (10)")
    parser.add_argument("--measure", type=int, metavar="N", help="each fault N times, one after the other")
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=list(FAULTS), help=",".join(FAULTS)
    )
    parser.add_argument("--load", type=float, default=0.5, help="share of the measured capacity (0.5)")
    parser.add_argument(
        "--calibrate", type=float, default=20.0, help="seconds to measure the capacity in (20)"
    )
    parser.add_argument("--mock", action="store_true", help="StandardMock instead of mindie-tiny")
    parser.add_argument("--seed", type=int, default=0, help="another seed does other things (0)")
    args = parser.parse_args(argv)
    if unknown := set(args.faults) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; use {','.join(FAULTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    config = configuration(LIMITS, mock=args.mock)
    with own_daemon(config) as daemon:
        run = asyncio.run(_run(daemon, config["ServerConfig"]["managementPort"], args))
        log = daemon.log_file.read_text(encoding="utf-8", errors="replace")
    print(report(run, args))
    found = findings(run)
    if "Traceback" in log:
        found.append("the log has a traceback: " + log[log.index("Traceback") :][:2000])
    print("\n" + ("\n".join(f"FAILED: {finding}" for finding in found) or "every request ended in one way"))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
