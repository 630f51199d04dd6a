#!/usr/bin/env python3
"""Send spoilt requests of every dialect to a running server and see that it answers each of them properly.

    python scripts/fuzz_bodies.py --count 10000
    python scripts/fuzz_bodies.py --replay chat:1234

Two daemons are started for it: every 20th request meets the shipped model, the others, for volume, a mock
(StandardMock). What must hold for every request:

* an answer comes, and it is no 5xx; an error is the canonical object; a stream that began ends properly
* the next good request works and has its usual answer
* memory and descriptors of the endpoint stay where they were

A request follows from (seed, dialect, number), so --replay shows a finding again: request, answer, faults.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from fuzz_cases import COMPLETION, GOOD, HOST, Case, good_message, make_case
from own_daemon import OwnDaemon, configuration, own_daemon

LIMITS = {
    "ServerConfig": {"maxRequestLength": 1},
    "BackendConfig": {
        "tokenizerProcessNumber": 1,  # each thread keeps what its largest text took
        "ScheduleConfig": {"maxIterTimes": 16, "maxN": 8, "maxQueueDelayMicroseconds": 500},
        "ModelDeployConfig": {"maxSeqLen": 1024, "maxInputTokenLen": 512},
    },
}
MODEL_EVERY = 20  # one case in so many meets the model
GOOD_EVERY = 10  # one good request after so many of a connection's cases
CLIENTS = 8
ANSWER_WITHIN_S = 30.0
DONE = "[DONE]"
STREAM_FAILED = "the stream failed"  # how the fault of a stream with an error event begins
# What a run may add to the endpoint: caches fill up to their bounds, so memory is compared after a warm-up.
WARM_UP = 400
MORE_BYTES = 96 * 2**20
MORE_DESCRIPTORS = 4
SETTLES_WITHIN_S = 10.0  # it sees the ends of the last connections a little after we made them


# --- answers -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool  # the body ended as its head announced
    closes: bool


async def read_answer(reader: asyncio.StreamReader) -> Answer | None:
    """None when the connection ends before an answer."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        if status != 100:
            break
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    body, whole = await _read_body(reader, headers)
    closes = headers.get("connection", "").lower() == "close" or not first.startswith("HTTP/1.1") or not whole
    return Answer(status, headers, body, whole, closes)


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bool]:
    try:
        if "content-length" in headers:
            return await reader.readexactly(int(headers["content-length"])), True
        if headers.get("transfer-encoding") != "chunked":
            return await reader.read(), True
    except asyncio.IncompleteReadError as error:
        return error.partial, False
    body = b""
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    except (asyncio.IncompleteReadError, ValueError):
        return body, False
    return body, True


def faults(case: Case, answer: Answer | None) -> list[str]:
    """What is wrong with an answer; nothing for a proper one, whatever its status."""
    if answer is None:
        return [] if not case.framed else ["the connection was closed without an answer"]
    if not answer.whole:
        return ["the body ended early"]
    if answer.status >= 500:
        return [f"status {answer.status}"]
    if answer.status == 400 and case.lone:
        return _error_faults(answer.body)  # not HTTP
    if answer.status not in (200, 400, 404, 405, 413, 417, 422, 424):
        return [f"status {answer.status}"]
    if answer.status != 200:
        return _error_faults(answer.body)
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _stream_faults(answer.body, case.path)
    return _json_faults(answer.body)[1]


def _json_faults(raw: bytes) -> tuple[Any, list[str]]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return None, [f"no proper JSON: {type(error).__name__}: {error}"[:200]]
    return value, []


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _error_faults(raw: bytes) -> list[str]:
    body, wrong = _json_faults(raw)
    if wrong:
        return wrong
    if not isinstance(body, dict):
        return ["the error is no object"]
    kind = body.get("error_type")
    texts = (body.get("error"), kind, body.get("type"))
    if not all(isinstance(text, str) and text for text in texts) or kind != body["type"]:
        return ["not the canonical error object"]
    return []


def _stream_faults(raw: bytes, path: str) -> list[str]:
    if urlsplit(path).path.endswith("/generate"):
        if not raw.endswith(b"\0"):
            return ["the last record has no end"]
        payloads = [record.decode("utf-8", "replace") for record in raw[:-1].split(b"\0")]
    else:
        if not raw.endswith(b"\n\n"):
            return ["the last frame has no end"]
        frames = raw[:-2].decode("utf-8", "replace").split("\n\n")
        if any(not frame.startswith("data:") or "\n" in frame for frame in frames):
            return ["a frame is not one data line"]
        payloads = [frame.removeprefix("data:").strip() for frame in frames]
    if "/v1/" in path and (payloads.pop() != DONE or DONE in payloads):
        return ["[DONE] is not the one last frame"]
    for payload in payloads:
        value, wrong = _json_faults(payload.encode())
        if wrong:
            return wrong
        if "error" in value:
            return [f"{STREAM_FAILED}: {payload[:200]}"]
    return [] if payloads else ["a stream without frames"]


# --- a run ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ledger:
    """What came of the cases of one dialect against one server."""

    dialect: str
    statuses: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    good: int = 0
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)  # seconds, number

    def note(self, case: Case, answer: Answer | None, wrong: Iterable[str]) -> None:
        self.statuses["none" if answer is None else str(answer.status)] += 1
        if answer is not None and answer.headers.get("content-type", "").startswith("text/event-stream"):
            self.streams += 1
        self.findings += [f"{case.dialect}:{case.number}: {fault}" for fault in wrong]


class Connection:
    """Kept alive between cases; opened again when it was spent."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, message: bytes, *, spent: bool = False, more: bool = True) -> Answer | None:
        """`spent`: use the connection for nothing else. `more`: False when nothing will follow `message`."""
        if spent:
            await self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        try:
            writer.write(message)
            if not more:
                writer.write_eof()
            answer = await asyncio.wait_for(read_answer(reader), ANSWER_WITHIN_S)
        except ConnectionError:
            answer = None
        if answer is None or answer.closes or spent:
            await self.close()
        return answer

    async def close(self) -> None:
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with contextlib.suppress(OSError):  # the server may have been first
                await writer.wait_closed()


LARGEST_MESSAGE = good_message("/v1/tokenizer", {"inputs": "word " * 200_000})
GOOD_MESSAGE = good_message("/v1/completions", COMPLETION)


async def _largest_at_once(port: int) -> None:
    """What the largest texts take for a moment, the threads that read them keep."""
    await asyncio.gather(*(Connection(port).exchange(LARGEST_MESSAGE, spent=True) for _ in range(CLIENTS)))


async def _usual_text(connection: Connection) -> str:
    answer = await connection.exchange(GOOD_MESSAGE)
    if answer is None or answer.status != 200:
        return f"status {answer.status if answer else 'none'}"
    return str(json.loads(answer.body)["choices"][0]["text"])


async def _fuzz(port: int, dialect: str, numbers: Sequence[int], seed: int) -> Ledger:
    ledger = Ledger(dialect)
    first = Connection(port)
    usual = await _usual_text(first)
    await first.close()
    queue = iter(numbers)

    async def client() -> None:
        connection = Connection(port)
        for count, number in enumerate(queue, 1):
            case = make_case(dialect, number, seed)
            sent = time.monotonic()
            try:
                answer = await connection.exchange(case.message, spent=case.lone, more=case.framed)
                wrong = faults(case, answer)
            except (asyncio.TimeoutError, OSError, ValueError) as error:
                answer, wrong = None, [f"{type(error).__name__}: {error}"]
                await connection.close()
            ledger.slowest = max(ledger.slowest, (time.monotonic() - sent, number))
            ledger.note(case, answer, wrong)
            if wrong or count % GOOD_EVERY == 0:
                ledger.good += 1
                if (text := await _usual_text(connection)) != usual:
                    ledger.findings.append(f"{dialect}:{number}: then a good request gave {text[:80]!r}")
        await connection.close()

    start = time.monotonic()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    ledger.seconds = time.monotonic() - start
    return ledger


def fuzz(port: int, dialect: str, numbers: Sequence[int], seed: int = 0) -> Ledger:
    """Send the cases of these numbers to the server on `port` and judge each answer."""
    return asyncio.run(_fuzz(port, dialect, numbers, seed))


@dataclass(slots=True)
class Footprint:
    """Of the endpoint process."""

    rss: int
    descriptors: int

    @classmethod
    def of(cls, endpoint: psutil.Process) -> Footprint:
        return cls(endpoint.memory_info().rss, endpoint.num_fds())

    def growth(self, later: Footprint) -> list[str]:
        """What grew beyond a cache's worth."""
        wrong = []
        if later.rss > self.rss + MORE_BYTES:
            wrong.append(f"the endpoint grew from {self.rss >> 20} to {later.rss >> 20} MiB")
        if later.descriptors > self.descriptors + MORE_DESCRIPTORS:
            wrong.append(f"the endpoint's descriptors went from {self.descriptors} to {later.descriptors}")
        return wrong

    def __str__(self) -> str:
        return f"{self.rss >> 20} MiB, {self.descriptors} descriptors"


def fuzz_server(name: str, daemon: OwnDaemon, args: argparse.Namespace, numbers: Sequence[int]) -> list[str]:
    """Every dialect against one server; prints its ledger and returns its findings."""
    findings: list[str] = []
    for dialect in args.dialects:  # caches fill, threads start
        fuzz(daemon.port, dialect, range(-WARM_UP // len(args.dialects), 0), args.seed)
    asyncio.run(_largest_at_once(daemon.port))
    before = Footprint.of(daemon.endpoint)
    print(f"\n{name}: endpoint at {before}", flush=True)
    for dialect in args.dialects:
        ledger = fuzz(daemon.port, dialect, numbers, args.seed)
        statuses = "  ".join(f"{status} x {count}" for status, count in sorted(ledger.statuses.items()))
        print(
            f"{dialect:<12}{sum(ledger.statuses.values()):>7} in {ledger.seconds:5.1f} s  {statuses}  "
            f"({ledger.streams} streams, {ledger.good} good between, slowest {ledger.slowest[0]:.1f} s: "
            f"{dialect}:{ledger.slowest[1]})  {len(ledger.findings)} findings; "
            f"then {Footprint.of(daemon.endpoint)}",
            flush=True,
        )
        for finding in ledger.findings[: args.show]:
            print(f"    {finding}")
        findings += ledger.findings
    until = time.monotonic() + SETTLES_WITHIN_S
    while (grown := before.growth(after := Footprint.of(daemon.endpoint))) and time.monotonic() < until:
        time.sleep(0.1)
    print(f"{name}: endpoint at {after}")
    findings += [f"{name}: {wrong}" for wrong in grown]
    if b"Traceback" in daemon.log_file.read_bytes():
        findings.append(f"{name}: the log has a traceback")
        print(_first_traceback(daemon.log_file))
    return findings


def _first_traceback(log_file: Path) -> str:
    text = log_file.read_text(encoding="utf-8", errors="replace")
    return text[text.index("Traceback") - 200 :][:4000]


def replay(daemon: OwnDaemon, dialect: str, number: int, seed: int) -> int:
    """Show one case; 1 when it has faults."""
    case = make_case(dialect, number, seed)
    exchange = Connection(daemon.port).exchange(case.message, spent=True, more=case.framed)
    answer = asyncio.run(exchange)
    wrong = faults(case, answer)
    print(f"--- request ({len(case.message)} bytes)\n{_shown(case.message)}\n--- answer")
    print("none" if answer is None else f"{answer.status} {answer.headers}\n{_shown(answer.body)}")
    print("--- faults\n" + ("\n".join(wrong) or "none"))
    if wrong and b"Traceback" in daemon.log_file.read_bytes():
        print(_first_traceback(daemon.log_file))
    return int(bool(wrong))


def _shown(raw: bytes, most: int = 3000) -> str:
    text = raw[:most].decode("utf-8", "backslashreplace")
    return text + (f"... {len(raw) - most} more bytes" if len(raw) > most else "")


# --- command line --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--count", type=int, default=10000, help="cases per dialect (10000)")
    parser.add_argument(
        "--dialects", type=lambda text: text.split(","), default=list(GOOD), help=",".join(GOOD)
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other requests (0)")
    parser.add_argument("--only", choices=("mock", "model"), help="use one of the two servers for all cases")
    parser.add_argument("--show", type=int, default=20, help="findings printed per dialect (20)")
    parser.add_argument("--replay", metavar="DIALECT:NUMBER", help="show one case instead")
    args = parser.parse_args(argv)
    if args.replay:
        dialect, _, number = args.replay.partition(":")
        if not number.lstrip("-").isdecimal():
            parser.error("--replay wants DIALECT:NUMBER, such as chat:1234")
        args.dialects, args.number = [dialect], int(number)
    if unknown := set(args.dialects) - set(GOOD):
        parser.error(f"no such dialect: {', '.join(sorted(unknown))}; use {','.join(GOOD)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 when nothing was found, 1 when something was."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if args.replay:
        mock = args.only == "mock" or (args.only is None and args.number % MODEL_EVERY != 0)
        with own_daemon(configuration(LIMITS, mock=mock)) as daemon:
            return replay(daemon, args.dialects[0], args.number, args.seed)
    shares = {
        "mock": [number for number in range(args.count) if args.only or number % MODEL_EVERY],
        "model": [number for number in range(args.count) if args.only or number % MODEL_EVERY == 0],
    }
    findings: list[str] = []
    start = time.monotonic()
    for name, numbers in shares.items():
        if args.only in (None, name):
            with own_daemon(configuration(LIMITS, mock=name == "mock")) as daemon:
                findings += fuzz_server(name, daemon, args, numbers)
    print(f"\n{args.count} cases for each of {len(args.dialects)} dialects, seed {args.seed}: ", end="")
    print(f"{len(findings)} findings in {time.monotonic() - start:.0f} s")
    for finding in findings:
        if finding.split(":")[0] in shares:
            print(f"    {finding}")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
