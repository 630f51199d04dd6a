#!/usr/bin/env python3
"""What overload does: a daemon of its own at 1x, then at 10x its capacity.

    python scripts/bench_overload.py --seconds 20 --json figures.json

1x    maxLinkNum connections in a closed loop: every place taken, nobody waits; the capacity is its requests/s
10x   so many times that rate arrives, whatever becomes of it, each request on an idle connection

Told are the refusals' latency (request sent to answer complete), their Retry-After, and the share of the 1x
throughput that accepted requests keep. The generator is one epoll loop beside the server on the same machine;
its share of the processor is told, because it takes from what is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench_api_layer import DIALECTS, Client, request
from bench_serving import CpuMeter, environment, positive_int
from own_daemon import HOST, NAME, configuration, own_daemon

_TICK_S = 0.002
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_RETRY_AFTER = re.compile(rb"(?i)\r\nretry-after: *(\d+)")
_LATE_S = 120.0  # longest wait for the last answers
Json = dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What came of the requests of one phase."""

    wall_s: float = 0.0
    accepted: int = 0  # answers with 200 that were complete while the clock ran
    refused_s: list[float] = field(default_factory=list)
    retry_after_s: Counter[int] = field(default_factory=Counter)
    others: Counter[int] = field(default_factory=Counter)  # by status
    unsent: int = 0  # no connection was left for them


class Generator:
    """Keep-alive connections; one carries one request at a time."""

    def __init__(self, port: int, message: bytes, most: int) -> None:
        self._port = port
        self._message = message
        self._most = most
        self._poller = select.epoll()
        self._clients: dict[int, Client] = {}
        self._idle: list[Client] = []
        self._sent: dict[int, float] = {}

    def send(self) -> bool:
        """On an idle connection, or a new one while there may be more."""
        if not self._idle:
            if len(self._clients) >= self._most:
                return False
            sock = socket.create_connection((HOST, self._port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._clients[sock.fileno()] = Client(sock)
            self._poller.register(sock.fileno(), select.EPOLLIN)
            self._idle.append(self._clients[sock.fileno()])
        client = self._idle.pop()
        self._sent[client.sock.fileno()] = time.perf_counter()
        client.sock.sendall(self._message)
        return True

    def receive(self, wait_s: float) -> list[tuple[float, bytes]]:
        """Answers that are complete now: seconds since they were asked for, and their bytes."""
        answers = []
        for number, _ in self._poller.poll(wait_s):
            client = self._clients[number]
            data = client.sock.recv(1 << 18)
            if not data:
                raise ValueError("the server closed a connection")
            if client.feed(data):
                answers.append((time.perf_counter() - self._sent.pop(number), b"".join(client.received)))
                client.received, client.missing = [], 0
                self._idle.append(client)
        return answers

    @property
    def pending(self) -> int:
        return len(self._sent)

    def close(self) -> None:
        self._poller.close()
        for client in self._clients.values():
            client.sock.close()


def note(outcome: Outcome, answers: Sequence[tuple[float, bytes]]) -> None:
    for seconds, answer in answers:
        found = _STATUS.match(answer)
        status = int(found[1]) if found else 0
        if status == 200:
            outcome.accepted += 1
        elif status == 503 and (again := _RETRY_AFTER.search(answer)):
            outcome.refused_s.append(seconds)
            outcome.retry_after_s[int(again[1])] += 1
        else:
            outcome.others[status] += 1


def closed_loop(generator: Generator, clients: int, seconds: float) -> Outcome:
    outcome = Outcome()
    start = time.perf_counter()
    for _ in range(clients):
        generator.send()
    while (now := time.perf_counter()) < start + seconds:
        answers = generator.receive(start + seconds - now)
        note(outcome, answers)
        for _ in answers:
            generator.send()
    outcome.wall_s = time.perf_counter() - start
    finish(generator)
    return outcome


def open_loop(generator: Generator, per_second: float, seconds: float, warm_s: float) -> Outcome:
    """What is answered in the first `warm_s` does not count: the line fills, and answers are late by it."""
    outcome = Outcome()
    start, sent = time.perf_counter(), 0
    counted = False
    while (now := time.perf_counter()) < start + warm_s + seconds:
        if not counted and now >= start + warm_s:
            counted, outcome = True, Outcome()
        due = int((now - start) * per_second)
        while sent < due:
            sent += 1
            outcome.unsent += not generator.send()
        note(outcome, generator.receive(_TICK_S))
    outcome.wall_s = time.perf_counter() - start - warm_s
    finish(generator)
    return outcome


def finish(generator: Generator) -> None:
    """Await what is on its way. Raises ValueError when it does not come."""
    until = time.perf_counter() + _LATE_S
    while generator.pending:
        if time.perf_counter() > until:
            raise ValueError(f"{generator.pending} answers did not come within {_LATE_S:.0f} s")
        generator.receive(0.1)


def figures(normal: Outcome, overload: Outcome) -> dict[str, float]:
    """Raises ValueError when a phase has nothing to tell."""
    if not normal.accepted or not overload.refused_s:
        raise ValueError(f"{normal.accepted} requests served at 1x, {len(overload.refused_s)} refused beyond")
    latencies = sorted(overload.refused_s)
    before, after = normal.accepted / normal.wall_s, overload.accepted / overload.wall_s
    return {
        "capacity_req_s": before,
        "accepted_req_s": after,
        "kept": after / before,
        "refused": float(len(latencies)),
        "refusal_median_ms": statistics.median(latencies) * 1e3,
        "refusal_p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "others": float(overload.others.total()),
        "unsent": float(overload.unsent),
    }


def measure(args: argparse.Namespace, port: int, daemon_pid: int) -> tuple[dict[str, float], Outcome]:
    dialect = DIALECTS["completions"]
    message = request(dialect.whole_path, dialect.body(args.output_len, False) | {"ignore_eos": True})
    # every place, the line, and those whose refusal is on its way
    generator = Generator(port, message, 3 * args.max_link_num + 256)
    try:
        closed_loop(generator, args.max_link_num, 1.0)  # warm-up
        normal = closed_loop(generator, args.max_link_num, args.seconds)
        rate = args.factor * normal.accepted / normal.wall_s
        drains_s = 3 * args.max_link_num * normal.wall_s / max(1, normal.accepted)
        meter = CpuMeter(daemon_pid, None)
        before = meter.read()
        overload = open_loop(generator, rate, args.seconds, warm_s=drains_s)
        after = meter.read()
    finally:
        generator.close()
    wall_s = overload.wall_s + drains_s
    found = figures(normal, overload)
    return found | {f"{role}_cores": (after[role] - before[role]) / wall_s for role in after}, overload


def report(args: argparse.Namespace, found: dict[str, float], overload: Outcome) -> str:
    again = overload.retry_after_s
    values = sorted(again.elements())
    return "\n".join(
        (
            f"places (maxLinkNum)      {args.max_link_num}, answers of {args.output_len} tokens",
            f"at 1x                    {found['capacity_req_s']:.1f} requests/s",
            f"arriving at {args.factor}x          {args.factor * found['capacity_req_s']:.0f} requests/s",
            f"accepted work            {found['accepted_req_s']:.1f} requests/s, {found['kept']:.0%} of 1x",
            f"refused                  {len(values)}, latency median {found['refusal_median_ms']:.1f} ms, "
            f"p99 {found['refusal_p99_ms']:.1f} ms",
            f"Retry-After              {values[0]} to {values[-1]} s, median {values[len(values) // 2]} s",
            f"other answers            {found['others']:.0f}; not sent for want of a connection: "
            f"{found['unsent']:.0f}",
            f"cores                    endpoint {found['endpoint_cores']:.2f}, worker "
            f"{found['workers_cores']:.2f}, generator {found['client_cores']:.2f}, "
            f"others {found['others_cores']:.2f}",
        )
    )


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--mock", action="store_true", help="StandardMock instead of mindie-tiny")
    parser.add_argument("--max-link-num", type=positive_int, default=16, help="places (16)")
    parser.add_argument("--output-len", type=positive_int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--factor", type=positive_int, default=10, help="times the capacity (10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of either phase (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when nothing could be measured."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    server = {"ServerConfig": {"maxLinkNum": args.max_link_num}}
    header = environment(f"{NAME}{' (StandardMock)' if args.mock else ''}", argv)
    try:
        with own_daemon(configuration(server, mock=args.mock)) as daemon:
            found, overload = measure(args, daemon.port, daemon.pid)
    except (OSError, ValueError, RuntimeError, psutil.Error) as error:
        print(f"cannot measure: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for name, value in header.items():
        print(f"{name:<10}{value}")
    print(f"\n{report(args, found, overload)}")
    if args.json:
        retry_after = {str(seconds): count for seconds, count in sorted(overload.retry_after_s.items())}
        document = {"environment": header, "figures": found, "retry_after_s": retry_after}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
