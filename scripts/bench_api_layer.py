#!/usr/bin/env python3
"""What the API layer costs: every dialect against a daemon without weights (modelInstanceType StandardMock).

    python scripts/bench_api_layer.py --streams 1,64,256 --json figures.json

It starts its own daemon over plain HTTP. The mock echoes prompts as fast as the scheduler can, so what is
measured is parsing, validation, tokenizing, scheduling, rings, detokenizing and writing frames. N connections
send their next request when the last answer is complete, for --seconds, then the last answers are awaited.

streamed answers  --output-len tokens each: tokens/s, and processor time of the endpoint per token
whole answers     one token each: requests/s, and processor time of the endpoint per request

The generator is one epoll loop on raw sockets that only looks for the end of an answer; its share of the
processor is in the tables. Generator, endpoint and worker are one process each and share the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench_serving import CpuMeter, environment, medians, positive_int, positive_ints, spread
from own_daemon import HOST, NAME, configuration, own_daemon

PROMPT = "The old mill by the river had stood there longer than anybody in the village could remember. "
# Room for every stream in one batch, and the shortest wait of the scheduler for a fuller one.
SCHEDULE = {
    "maxBatchSize": 512,
    "maxPrefillBatchSize": 256,
    "maxPrefillTokens": 32768,
    "maxQueueDelayMicroseconds": 500,
}
Json = dict[str, Any]


# --- dialects ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialect:
    stream_path: str
    whole_path: str
    body: Callable[[int, bool], Json]  # (output tokens, stream) -> request
    frame: bytes = b"data:"  # what every frame of a stream holds once


def _openai(prompt: Json) -> Callable[[int, bool], Json]:
    return lambda length, stream: {"model": NAME, "max_tokens": length, "stream": stream, **prompt}


def _with_parameters(prompt: Json) -> Callable[[int, bool], Json]:
    return lambda length, stream: {**prompt, "parameters": {"max_new_tokens": length}}


def _native(length: int, stream: bool) -> Json:
    return {"inputs": PROMPT, "stream": stream, "parameters": {"max_new_tokens": length}}


def _vllm(length: int, stream: bool) -> Json:
    return {"prompt": PROMPT, "max_tokens": length, "stream": stream}


TRITON = f"/v2/models/{NAME}"
MESSAGES = [{"role": "user", "content": PROMPT}]
DIALECTS = {
    "chat": Dialect("/v1/chat/completions", "/v1/chat/completions", _openai({"messages": MESSAGES})),
    "completions": Dialect("/v1/completions", "/v1/completions", _openai({"prompt": PROMPT})),
    "vllm": Dialect("/generate", "/generate", _vllm, b'{"text":'),
    "tgi": Dialect("/generate_stream", "/generate", _with_parameters({"inputs": PROMPT})),
    "triton": Dialect(
        f"{TRITON}/generate_stream", f"{TRITON}/generate", _with_parameters({"text_input": PROMPT})
    ),
    "native": Dialect("/infer", "/infer", _native),
}


def request(path: str, body: Json) -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


# --- load ----------------------------------------------------------------------------------------------

_CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_READ_BYTES = 1 << 18


@dataclass(slots=True)
class Client:
    """One keep-alive connection; `received` is the answer so far."""

    sock: socket.socket
    received: list[bytes] = field(default_factory=list)
    missing: int = 0  # bytes still to come; 0 before the head and for chunked answers

    def feed(self, data: bytes) -> bool:
        """Whether the answer is complete."""
        if not self.received and (length := _CONTENT_LENGTH.search(data, 0, data.find(b"\r\n\r\n"))):
            self.missing = int(length[1]) + data.find(b"\r\n\r\n") + 4
        self.received.append(data)
        if self.missing:
            self.missing -= len(data)
            return self.missing == 0
        if len(data) < len(_LAST_CHUNK):
            data = b"".join(self.received[-len(_LAST_CHUNK) :])
        return data.endswith(_LAST_CHUNK)


@dataclass(slots=True)
class Load:
    wall_s: float
    answers: list[bytes]


def run_load(port: int, message: bytes, streams: int, seconds: float, timeout_s: float = 60.0) -> Load:
    """`streams` connections in a closed loop. Raises ValueError when one breaks or nothing comes."""
    clients: dict[int, Client] = {}
    poller = select.epoll()
    answers: list[bytes] = []
    try:
        for _ in range(streams):
            sock = socket.create_connection((HOST, port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            clients[sock.fileno()] = Client(sock)
            poller.register(sock.fileno(), select.EPOLLIN)
        start = time.perf_counter()
        until = start + seconds
        for client in clients.values():
            client.sock.sendall(message)
        pending = streams
        while pending:
            ready = poller.poll(timeout_s)
            if not ready:
                raise ValueError(f"no answer within {timeout_s:.0f} s")
            for number, _ in ready:
                client = clients[number]
                data = client.sock.recv(_READ_BYTES)
                if not data:
                    raise ValueError("the server closed a connection")
                if not client.feed(data):
                    continue
                answers.append(b"".join(client.received))
                client.received, client.missing = [], 0
                if time.perf_counter() < until:
                    client.sock.sendall(message)
                else:
                    pending -= 1
        return Load(time.perf_counter() - start, answers)
    finally:
        poller.close()
        for client in clients.values():
            client.sock.close()


def check(load: Load, dialect: Dialect, frames: int | None) -> None:
    """Every answer is a 200 of the right length, or the figures mean nothing. Raises ValueError."""
    for answer in load.answers:
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"not a 200: {answer[:300].decode(errors='replace')}")
        if frames is not None and answer.count(dialect.frame) < frames:
            raise ValueError(f"{answer.count(dialect.frame)} frames instead of {frames}")


# --- figures -------------------------------------------------------------------------------------------


def figures(load: Load, cpu: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Of one run whose answers have `tokens` tokens each; `cpu` in seconds per role."""
    requests = len(load.answers)
    found = {
        "requests": float(requests),
        "wall_s": load.wall_s,
        "req_s": requests / load.wall_s,
        "tok_s": requests * tokens / load.wall_s,
        "endpoint_us_per_token": cpu["endpoint"] / (requests * tokens) * 1e6,
        "endpoint_us_per_request": cpu["endpoint"] / requests * 1e6,
        "worker_us_per_token": cpu["workers"] / (requests * tokens) * 1e6,
    }
    found |= {f"{role}_cores": seconds / load.wall_s for role, seconds in cpu.items()}
    return found


def measure(args: argparse.Namespace, port: int, daemon_pid: int) -> list[Json]:
    meter = CpuMeter(daemon_pid, None)
    results = []
    for name in args.dialects:
        dialect = DIALECTS[name]
        for mode, tokens in (("stream", args.output_len), ("whole", 1)):
            path = dialect.stream_path if mode == "stream" else dialect.whole_path
            message = request(path, dialect.body(tokens, mode == "stream"))
            frames = tokens if mode == "stream" else None
            check(run_load(port, message, 2, 0.0), dialect, frames)  # warm-up
            for streams in args.streams:
                runs = []
                for _ in range(args.repeats):
                    before = meter.read()
                    load = run_load(port, message, streams, args.seconds)
                    after = meter.read()
                    check(load, dialect, frames)
                    runs.append(figures(load, {role: after[role] - before[role] for role in after}, tokens))
                middle = medians(runs) | {"spread_percent": 100 * spread(runs, "req_s")}
                results.append(
                    {"dialect": name, "mode": mode, "streams": streams, "median": middle, "runs": runs}
                )
    return results


# --- report --------------------------------------------------------------------------------------------

_COLUMNS = {
    "stream": [
        ("tok/s", "tok_s", "{:,.0f}"),
        ("req/s", "req_s", "{:,.0f}"),
        ("endpoint us/token", "endpoint_us_per_token", "{:.1f}"),
    ],
    "whole": [
        ("req/s", "req_s", "{:,.0f}"),
        ("endpoint us/request", "endpoint_us_per_request", "{:,.0f}"),
    ],
}
_COST = {"stream": "endpoint_us_per_token", "whole": "endpoint_us_per_request"}
_CORES = [
    (f"{role} CPU %", f"{key}_cores", "{:.0%}")
    for role, key in (("endpoint", "endpoint"), ("worker", "workers"), ("client", "client"))
]


def table(results: Sequence[Json], mode: str) -> str:
    """Markdown; `growth`: the endpoint's cost compared with the fewest streams of the dialect."""
    columns = _COLUMNS[mode]
    titles = ["dialect", "streams", *(title for title, *_ in columns), "growth", *(t for t, *_ in _CORES)]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    rows = [result for result in results if result["mode"] == mode]
    for row in rows:
        first = next(other for other in rows if other["dialect"] == row["dialect"])
        at_first = first["median"][_COST[mode]]  # a run of milliseconds may have cost no tick of the clock
        growth = row["median"][_COST[mode]] / at_first if at_first else math.nan
        cells = [row["dialect"], str(row["streams"])]
        cells += [form.format(row["median"][key]) for _, key, form in columns]
        cells += [f"{growth:.2f}"] + [form.format(row["median"][key]).rstrip("%") for _, key, form in _CORES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(args: argparse.Namespace, results: Sequence[Json]) -> str:
    others = max(result["median"]["others_cores"] for result in results)
    return (
        f"Streamed answers of {args.output_len} tokens, medians of {args.repeats}:\n\n"
        f"{table(results, 'stream')}\n\n"
        f"Whole answers of 1 token, medians of {args.repeats}:\n\n{table(results, 'whole')}\n\n"
        f"Other processes used at most {others:.2f} cores meanwhile."
    )


# --- command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dialects", type=lambda text: text.split(","), default=list(DIALECTS), help=",".join(DIALECTS)
    )
    parser.add_argument("--streams", type=positive_ints, default=[1, 64, 256], help="levels (1,64,256)")
    parser.add_argument(
        "--output-len", type=positive_int, default=64, help="tokens of a streamed answer (64)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="how long new requests are sent (1)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="of every level (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    args = parser.parse_args(argv)
    if unknown := set(args.dialects) - set(DIALECTS):
        parser.error(f"--dialects: no such dialect: {', '.join(sorted(unknown))}; use {','.join(DIALECTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when nothing could be measured."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    schedule = SCHEDULE | {"maxIterTimes": max(512, args.output_len)}
    config = configuration({"BackendConfig": {"ScheduleConfig": schedule}}, mock=True)
    # dialects without ignore_eos of their own: chat templates end messages with EOS
    config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["ignore_eos"] = True
    header = environment(f"{NAME} (StandardMock)", argv)
    try:
        with own_daemon(config) as daemon:
            results = measure(args, daemon.port, daemon.pid)
    except (OSError, ValueError, RuntimeError, psutil.Error) as error:
        print(f"cannot measure: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for name, value in header.items():
        print(f"{name:<10}{value}")
    print(f"\n{report(args, results)}")
    if args.json:
        document = {"environment": header, "results": results}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
