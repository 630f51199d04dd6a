#!/usr/bin/env python3
"""Measure a running server under load: streaming completions in a closed loop.

    python scripts/bench_serving.py --tokenizer models/mindie-tiny --concurrency 1,8,32 --daemon-pid PID

Each of the N clients of a level sends its next request when its last answer is complete. All prompts differ,
so no prefix cache helps. Every level is repeated with other prompts; medians over the repeats are reported.

TTFT  request sent to the first frame with text (connections are open by then)
TPOT  (last frame - first frame) / (tokens - 1), per request
ITL   gaps between the frames of a request
E2E   request sent to the last frame

The generator shares the processor with the server, so while the clock runs it only notes what arrived when;
frames are taken apart after the run. Other OpenAI-compatible servers can be measured too, see --plain.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import os
import platform
import random
import re
import shlex
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENT_FILES = REPOSITORY / "mindie-service" / "security" / "client"
COMPLETIONS = "/v1/completions"

# --- one connection ------------------------------------------------------------------------------------

HEAD_END = b"\r\n\r\n"
# The end of a chunked body with the end of the chunk (or head) before it: text alone cannot look like it.
LAST_CHUNK = b"\r\n0\r\n\r\n"

Reads = list[tuple[float, bytes]]


class Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection. Answers are kept as they arrive: pieces and their times."""

    def __init__(self) -> None:
        self.usable = False
        self.num_reads = 0
        self._reads: Reads = []
        self._answered: asyncio.Future[Reads] | None = None
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._in_body = False
        self._missing = -1  # bytes of the body still to come; -1: chunked or until the connection closes
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.usable = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._finish()

    async def exchange(self, request: bytes) -> tuple[float, Reads]:
        """Send and wait for the answer: when it was sent (perf_counter) and what came, possibly cut short."""
        assert self._transport is not None
        self._reads, self._head, self._in_body, self._missing, self._tail = [], b"", False, -1, b""
        self._answered = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        self._transport.write(request)
        return sent, await self._answered

    def data_received(self, data: bytes) -> None:
        self._reads.append((time.perf_counter(), data))
        self.num_reads += 1
        if not self._in_body:
            self._head += data
            head, end, body = self._head.partition(HEAD_END)
            if not end:
                return
            self._in_body = True
            length = re.search(rb"(?i)\r\ncontent-length:\s*(\d+)", head)
            if length:
                self._missing = int(length[1])
            if re.search(rb"(?i)\r\nconnection:\s*close", head):
                self.usable = False
            data, self._tail = body, HEAD_END
        if self._missing >= 0:
            self._missing -= len(data)
            if self._missing <= 0:
                self._finish()
            return
        self._tail = (self._tail + data[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK:
            self._finish()

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(self._reads)


# --- taking answers apart ------------------------------------------------------------------------------

# Inside a JSON string these quotes would be escaped, so the pattern cannot match generated text.
TEXT_FIELD = re.compile(rb'"text":\s*"(?!")')
CHOICE_FIELD = re.compile(rb'"text":\s*"')
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
ERROR_FRAME = re.compile(rb'^\s*\{\s*"error"')


class Dechunker:
    """Removes the framing of `Transfer-Encoding: chunked` from pieces cut anywhere."""

    def __init__(self) -> None:
        self._pending = b""
        self._left = 0  # bytes of the present chunk still to come, with its line end

    def feed(self, data: bytes) -> bytes:
        payload = []
        data = self._pending + data
        at = 0
        while at < len(data):
            if self._left > 0:
                piece = data[at : at + self._left]
                # the last two bytes of a chunk are its line end, which may come in a piece of its own
                payload.append(piece[: max(0, self._left - 2)])
                self._left -= len(piece)
                at += len(piece)
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            size = int(data[at:end].split(b";")[0] or b"0", 16)
            self._left = size + 2 if size else 0
            at = end + 2
        self._pending = data[at:]
        return b"".join(payload)


@dataclass(slots=True)
class Answer:
    """One streamed answer; times are perf_counter seconds."""

    sent: float
    frames: list[float] = field(default_factory=list)  # arrival of every frame that carries a choice
    first_text: float | None = None
    completion_tokens: int | None = None  # as the server counts
    prompt_tokens: int | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.frames) if self.completion_tokens is None else self.completion_tokens

    @property
    def first(self) -> float:
        """A server whose text is empty throughout still answered with its first frame."""
        return self.frames[0] if self.first_text is None else self.first_text


def split_head(reads: Reads) -> tuple[int, bool, Reads]:
    """Status, whether the body is chunked, and the pieces of the body."""
    head = b""
    for index, (when, data) in enumerate(reads):
        head, end, body = (head + data).partition(HEAD_END)
        if end:
            chunked = re.search(rb"(?i)\r\ntransfer-encoding:\s*chunked", head) is not None
            return int(head.split(None, 2)[1]), chunked, [(when, body), *reads[index + 1 :]]
    raise ValueError("the connection was closed before an answer")


def read_answer(sent: float, reads: Reads) -> Answer:
    """Find first and last frame, their times and the usage; what is wrong becomes `error`."""
    answer = Answer(sent)
    try:
        status, chunked, pieces = split_head(reads)
        if chunked:
            dechunker = Dechunker()
            pieces = [(when, dechunker.feed(data)) for when, data in pieces]
    except (ValueError, IndexError) as error:
        answer.error = str(error)
        return answer
    if status != 200:
        body = b"".join(data for _, data in pieces)
        answer.error = f"HTTP {status}: {body[:200].decode(errors='replace')}"
        return answer
    ended = False
    for when, event in events(pieces):
        if event == b"[DONE]":
            ended = True
        elif ERROR_FRAME.match(event):
            answer.error = event[:200].decode(errors="replace")
        elif CHOICE_FIELD.search(event):
            answer.frames.append(when)
            if answer.first_text is None and TEXT_FIELD.search(event):
                answer.first_text = when
        if b'"usage"' in event and (completion := COMPLETION_TOKENS.search(event)):
            answer.completion_tokens = int(completion[1])
            prompt = PROMPT_TOKENS.search(event)
            answer.prompt_tokens = int(prompt[1]) if prompt else None
    if answer.error is None and not (ended and answer.frames):
        answer.error = "the stream ended early" if answer.frames else "no text came"
    return answer


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event with the time its line was complete."""
    rest = b""
    for when, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield when, line[5:].strip()


# --- requests ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests go, and how."""

    url: SplitResult
    tls: ssl.SSLContext | None
    timeout_s: float

    @property
    def host(self) -> str:
        return self.url.hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        return self.url.port or (443 if self.tls else 80)

    def request(self, body: Mapping[str, Any]) -> bytes:
        """The bytes of one POST; built before the clock runs."""
        payload = json.dumps(body).encode()
        head = (
            f"POST {self.url.path.rstrip('/')}{COMPLETIONS} HTTP/1.1\r\nHost: {self.url.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        return head.encode() + payload

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=self.tls)
        return connection

    def first_model(self) -> str:
        """The id of the first model the server lists."""
        client: http.client.HTTPConnection = (
            http.client.HTTPSConnection(self.host, self.port, context=self.tls, timeout=self.timeout_s)
            if self.tls
            else http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        )
        client.request("GET", f"{self.url.path.rstrip('/')}/v1/models")
        response = client.getresponse()
        body = response.read()
        client.close()
        if response.status != 200:
            raise ValueError(f"GET /v1/models: HTTP {response.status}")
        return str(json.loads(body)["data"][0]["id"])


def usable_ids(tokenizer: Path | None, vocab_size: int | None) -> Sequence[int]:
    """Token ids that prompts are drawn from: no special ones.

    Without a tokenizer nobody knows which those are; they are usually the first or the last ids.
    """
    if tokenizer is None:
        assert vocab_size is not None
        margin = vocab_size // 16
        return range(margin, vocab_size - margin)
    document = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = document["model"]["vocab"]
    ids = set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))
    ids -= {token["id"] for token in document.get("added_tokens", ())}
    return sorted(index for index in ids if vocab_size is None or index < vocab_size)


def random_prompts(ids: Sequence[int], length: int, seed: int) -> Iterator[list[int]]:
    """Prompts without end, with nothing in common."""
    drawn = random.Random(seed)
    while True:
        yield drawn.choices(ids, k=length)


def make_prompts(args: argparse.Namespace) -> Iterator[list[int] | str]:
    if args.prompt_file is None:
        return random_prompts(usable_ids(args.tokenizer, args.vocab_size), args.input_len, args.seed)
    lines = [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{args.prompt_file} holds no prompts")
    return itertools.cycle(lines)


def request_body(model: str, prompt: list[int] | str, args: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": args.output_len,
        "temperature": 0,
        "stream": True,
    }
    if not args.no_usage:
        body["stream_options"] = {"include_usage": True}
    if not args.plain:
        body["ignore_eos"] = True
    return body


# --- processor time ------------------------------------------------------------------------------------


class CpuMeter:
    """Seconds of processor time per role: endpoint, workers, daemon, client, and everybody else together."""

    def __init__(self, daemon_pid: int | None, endpoint_pid: int | None) -> None:
        """A child of the daemon that listens on a port is its endpoint, unless `endpoint_pid` names it."""
        self._roles: dict[str, list[psutil.Process]] = {"client": [psutil.Process()]}
        endpoint = [psutil.Process(endpoint_pid)] if endpoint_pid else []
        if daemon_pid:
            daemon = psutil.Process(daemon_pid)
            children = daemon.children(recursive=True)
            endpoint = endpoint or [child for child in children if _listens(child)]
            self._roles["daemon"] = [daemon]
            self._roles["workers"] = [child for child in children if child not in endpoint]
        if endpoint:
            self._roles["endpoint"] = endpoint

    def read(self) -> dict[str, float]:
        seconds = {role: sum(map(_cpu_seconds, group)) for role, group in self._roles.items()}
        if "workers" in seconds:  # only then is the rest of the machine's work not the server's
            total = psutil.cpu_times()
            busy = sum(total) - total.idle - getattr(total, "iowait", 0.0) - getattr(total, "guest", 0.0)
            seconds["others"] = busy - sum(seconds.values())
        return seconds


def _listens(process: psutil.Process) -> bool:
    return any(link.status == psutil.CONN_LISTEN for link in process.net_connections("tcp"))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# --- one run -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Load:
    """Requests of one repeat on their way; the progress bar watches it."""

    total: int
    connections: list[Connection]
    done: int = 0

    @property
    def num_reads(self) -> int:
        return sum(connection.num_reads for connection in self.connections)


async def run_load(
    target: Target, requests: Sequence[bytes], concurrency: int, label: str
) -> tuple[float, list[Answer]]:
    """Send all requests, at most `concurrency` at once: wall seconds, and the answers in order."""
    clients = min(concurrency, len(requests))
    load = Load(len(requests), list(await asyncio.gather(*(target.connect() for _ in range(clients)))))
    raw: list[tuple[float, Reads] | str] = ["not sent"] * len(requests)
    queue = iter(enumerate(requests))

    async def client(slot: int) -> None:
        for index, request in queue:
            try:
                if not load.connections[slot].usable:
                    load.connections[slot].close()
                    load.connections[slot] = await target.connect()
                exchange = load.connections[slot].exchange(request)
                raw[index] = await asyncio.wait_for(exchange, target.timeout_s)
            except (OSError, asyncio.TimeoutError) as error:
                raw[index] = f"{type(error).__name__}: {error}"
                load.connections[slot].close()
            load.done += 1

    progress = asyncio.create_task(show_progress(load, label)) if sys.stderr.isatty() else None
    start = time.perf_counter()
    await asyncio.gather(*(client(slot) for slot in range(clients)))
    wall = time.perf_counter() - start
    for connection in load.connections:
        connection.close()
    if progress:
        progress.cancel()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return wall, [Answer(start, error=it) if isinstance(it, str) else read_answer(*it) for it in raw]


async def show_progress(load: Load, label: str, width: int = 30) -> None:
    """Redraw the bar twice a second until cancelled."""
    start = time.monotonic()
    while True:
        bar = "#" * (width * load.done // load.total)
        line = f"{load.done}/{load.total} requests, {load.num_reads} reads, {time.monotonic() - start:.0f} s"
        print(f"\r\x1b[K{label} [{bar:.<{width}}] {line}", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5)


# --- figures -------------------------------------------------------------------------------------------

SHARES = (50, 90, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values, of which there is at least one."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(
    answers: Sequence[Answer], wall: float, cpu: Mapping[str, float], input_len: int, output_len: int
) -> dict[str, float]:
    """The figures of one repeat, flat: latencies in ms, `cpu_*` in seconds. Without answers some are absent.

    `input_len` and `output_len` are the lengths asked for.
    """
    good = [answer for answer in answers if answer.error is None]
    output = sum(answer.tokens for answer in good)
    given = sum(input_len if answer.prompt_tokens is None else answer.prompt_tokens for answer in good)
    figures: dict[str, float] = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "short": sum(answer.tokens != output_len for answer in good),
        "uncounted": sum(answer.completion_tokens is None for answer in good),
        "wall_s": wall,
        "output_tokens": output,
        "output_tok_s": output / wall,
        "total_tok_s": (output + given) / wall,
        "req_s": len(good) / wall,
    }
    latencies = {
        "ttft": [answer.first - answer.sent for answer in good],
        "tpot": [(a.frames[-1] - a.first) / (a.tokens - 1) for a in good if a.tokens > 1],
        "itl": [b - a for answer in good for a, b in itertools.pairwise(answer.frames)],
        "e2e": [answer.frames[-1] - answer.sent for answer in good],
    }
    for name, values in latencies.items():
        for share in SHARES if values else ():
            figures[f"{name}_ms_p{share}"] = percentile(values, share) * 1e3
    for role, seconds in cpu.items():
        figures[f"cpu_{role}_s"] = seconds
    if "endpoint" in cpu and output:
        figures["endpoint_us_per_token"] = cpu["endpoint"] / output * 1e6
    if "client" in cpu and output:
        figures["client_us_per_token"] = cpu["client"] / output * 1e6
    if "others" in cpu:
        figures["other_cores"] = cpu["others"] / wall
    return figures


def medians(repeats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every figure that each repeat has."""
    names = [name for name in repeats[0] if all(name in repeat for repeat in repeats)]
    return {name: statistics.median(repeat[name] for repeat in repeats) for name in names}


def spread(repeats: Sequence[Mapping[str, float]], name: str) -> float:
    """(largest - smallest) / median over the repeats."""
    values = [repeat[name] for repeat in repeats]
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


# --- report --------------------------------------------------------------------------------------------

ROWS = (
    ("requests", "requests", 0),
    ("failed", "failed", 0),
    ("wrong length", "short", 0),
    ("wall s", "wall_s", 2),
    ("output tok/s", "output_tok_s", 1),
    ("  spread %", "spread_percent", 1),
    ("total tok/s", "total_tok_s", 1),
    ("req/s", "req_s", 2),
    *(
        (f"{name.upper()} ms p{share}", f"{name}_ms_p{share}", 1)
        for name in ("ttft", "tpot", "itl", "e2e")
        for share in SHARES
    ),
    *((f"CPU s {role}", f"cpu_{role}_s", 2) for role in ("endpoint", "workers", "daemon", "client")),
    ("endpoint us/token", "endpoint_us_per_token", 1),
    ("client us/token", "client_us_per_token", 1),
    ("other cores", "other_cores", 2),
)
# Measured: 0.7 of a core of foreign work cost two thirds of the throughput on two cores.
MAX_OTHER_CORES = 0.15


def table(levels: Mapping[int, Mapping[str, float]]) -> str:
    """A row per figure that was taken, a column per concurrency."""
    width = 12
    lines = [f"{'concurrency':<18}" + "".join(f"{level:>{width}}" for level in levels)]
    for title, name, digits in ROWS:
        if any(name in figures for figures in levels.values()):
            cells = (f"{figures.get(name, float('nan')):>{width},.{digits}f}" for figures in levels.values())
            lines.append(f"{title:<18}" + "".join(cells))
    return "\n".join(lines)


def environment(model: str, argv: Sequence[str]) -> dict[str, str]:
    """What a figure means nothing without."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "model": model,
        "command": shlex.join([Path(sys.argv[0]).name, *argv]),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def git_commit() -> str:
    """Short hash, with + when the tree differs from it."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- command line --------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, target: Target, model: str) -> dict[int, dict[str, Any]]:
    """Every level: its median figures and the repeats they come from."""
    prompts = make_prompts(args)
    meter = CpuMeter(args.daemon_pid, args.endpoint_pid)

    def batch(count: int) -> list[bytes]:
        return [target.request(request_body(model, next(prompts), args)) for _ in range(count)]

    if args.warmup > 0:
        _, answers = asyncio.run(run_load(target, batch(args.warmup), args.warmup, "warm-up"))
        if all(answer.error for answer in answers):
            raise ValueError(f"the warm-up failed: {answers[0].error}")
    levels = {}
    for concurrency in args.concurrency:
        repeats = []
        for repeat in range(args.repeats):
            requests = batch(args.requests or 2 * concurrency)
            before = meter.read()
            label = f"c{concurrency} {repeat + 1}/{args.repeats}"
            wall, answers = asyncio.run(run_load(target, requests, concurrency, label))
            after = meter.read()
            cpu = {role: after[role] - before[role] for role in after}
            repeats.append(summarize(answers, wall, cpu, args.input_len, args.output_len))
            for error in sorted({answer.error for answer in answers if answer.error})[:3]:
                print(f"{label}: {error}", file=sys.stderr)
        figures = medians(repeats) | {"spread_percent": 100 * spread(repeats, "output_tok_s")}
        figures["failed"] = max(repeat["failed"] for repeat in repeats)
        levels[concurrency] = {"median": figures, "repeats": repeats}
    return levels


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def positive_ints(text: str) -> list[int]:
    """An argparse type: 1,8,32."""
    return [positive_int(part) for part in text.split(",")]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--url", default="https://127.0.0.1:1025", help="http:// or https:// (mutual TLS)")
    parser.add_argument("--cacert", type=Path, default=CLIENT_FILES / "ca.pem")
    parser.add_argument("--cert", type=Path, default=CLIENT_FILES / "client.pem")
    parser.add_argument("--key", type=Path, default=CLIENT_FILES / "client.key.pem")
    parser.add_argument("--model", help="default: the first that GET /v1/models lists")
    source = parser.add_argument_group("prompts", "random ids of --tokenizer or --vocab-size, or text")
    source.add_argument("--tokenizer", type=Path, metavar="DIR", help="model directory with a tokenizer.json")
    source.add_argument("--vocab-size", type=positive_int, help="draw ids below this")
    source.add_argument("--prompt-file", type=Path, help="one prompt a line, taken in turn")
    source.add_argument("--input-len", type=positive_int, default=256, help="tokens per prompt (256)")
    parser.add_argument("--output-len", type=positive_int, default=128, help="tokens per answer (128)")
    parser.add_argument("--concurrency", type=positive_ints, default=[1, 8, 32], help="levels (1,8,32)")
    parser.add_argument("--requests", type=positive_int, help="per repeat (2 x concurrency)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="of every level (3)")
    parser.add_argument("--warmup", type=int, default=1, help="requests sent before measuring (1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the prompts; a prefix cache wants a new one per run"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds an answer may take")
    parser.add_argument("--plain", action="store_true", help="only standard OpenAI fields: no ignore_eos")
    parser.add_argument("--no-usage", action="store_true", help="do not ask for stream_options.include_usage")
    parser.add_argument("--daemon-pid", type=int, help="report processor time of it and its children")
    parser.add_argument("--endpoint-pid", type=int, help="default: the daemon's child that listens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    args = parser.parse_args(argv)
    if not (args.tokenizer or args.vocab_size or args.prompt_file):
        parser.error("one of --tokenizer, --vocab-size, --prompt-file is needed to make prompts")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every request was answered, 1 when some failed, 2 when nothing could be measured."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        url = urlsplit(args.url)
        tls = client_context(args.cacert, args.cert, args.key) if url.scheme == "https" else None
        target = Target(url, tls, args.timeout)
        model = args.model or target.first_model()
        header = environment(model, argv)
        levels = measure(args, target, model)
    except (OSError, ValueError, LookupError, psutil.Error, http.client.HTTPException) as error:
        print(f"cannot measure: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    shown = {level: result["median"] for level, result in levels.items()}
    for name, value in header.items():
        print(f"{name:<10}{value}")
    prompt = args.prompt_file or f"{args.input_len} tokens"
    print(f"\nprompts {prompt}, output {args.output_len} tokens; medians of {args.repeats}\n\n{table(shown)}")
    if any(figures.get("other_cores", 0.0) > MAX_OTHER_CORES for figures in shown.values()):
        print(f"\nother processes used more than {MAX_OTHER_CORES} core: do not judge by these figures")
    if any(figures["uncounted"] for figures in shown.values()):
        print("\nthe server sent no usage: tokens are frames")
    if args.json:
        report = {"environment": header, "levels": {str(level): result for level, result in levels.items()}}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(figures["failed"] for figures in shown.values()))


def client_context(cacert: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """TLS that trusts `cacert` only and shows the client certificate."""
    context = ssl.create_default_context(cafile=str(cacert))
    context.load_cert_chain(str(cert), str(key))
    return context


if __name__ == "__main__":
    sys.exit(main())
