"""Mixed requests for scripts/soak.py and scripts/chaos.py, and the ledger in which each of them ends once.

A client reads to the end, hangs up somewhere in between, reads slowly, or sends a spoilt body of
scripts/fuzz_cases.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fuzz_bodies import STREAM_FAILED, Answer, faults, read_answer
from fuzz_cases import GOOD, HOST, Case, make_case
from ledger import Ending, Fate, Ledger, Manner
from traffic_requests import Ask, make_ask

ENDS_WITHIN_S = 120.0  # a request that has not ended by then is lost
_SPARE_FOR_S = 5.0  # a connection idle for longer is not used again: the server may be about to close it
_SLOW_BYTES = 4096  # receive buffer of a slow reader
_SLOW_PAUSE_S = 0.2

# --- answers -------------------------------------------------------------------------------------------


def judge(path: str, answer: Answer | None) -> tuple[Fate, str]:
    """The fate an answer means, with what is wrong with it or what its error says."""
    if answer is None or not answer.whole:
        return Fate.LOST, "no answer" if answer is None else "the answer is cut short"
    if answer.status in (429, 503):
        return Fate.REFUSED, str(answer.status)
    if answer.status >= 500:
        return Fate.ERROR, f"{answer.status} {answer.body[:200].decode('utf-8', 'replace')}"
    wrong = faults(Case("", 0, path, b"", lone=True), answer)
    if wrong:
        return (Fate.ERROR if wrong[0].startswith(STREAM_FAILED) else Fate.LOST), wrong[0]
    return (Fate.FINISHED, "") if answer.status == 200 else (Fate.REFUSED, str(answer.status))


def text_of(answer: Answer) -> str:
    """The text of the first choice of a finished answer, whatever its dialect."""
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        raw = answer.body.decode()
        records = raw.split("\0") if "\0" in raw else [line[5:] for line in raw.splitlines() if line]
        frames = [json.loads(record) for record in records if record.strip() not in ("", "[DONE]")]
        whole = [frame["generated_text"] for frame in frames if frame.get("generated_text") is not None]
        return str(whole[-1]) if whole else "".join(map(_piece, frames))
    return _piece(json.loads(answer.body))


def _piece(frame: Mapping[str, Any]) -> str:
    if choices := frame.get("choices"):
        choice = choices[0]
        said = choice.get("delta") or choice.get("message") or {}
        return str(choice.get("text") or said.get("content") or "")
    text = frame.get("text") or frame.get("text_output") or frame.get("generated_text") or ""
    return str(text[0] if isinstance(text, list) else text)


# --- one exchange --------------------------------------------------------------------------------------


class TimedReader(asyncio.StreamReader):
    """Knows when the first byte since `restart` came."""

    first_at: float | None = None

    def restart(self) -> None:
        self.first_at = None

    def feed_data(self, data: bytes | bytearray | memoryview) -> None:  # type: ignore[override]
        if self.first_at is None:
            self.first_at = time.monotonic()
        super().feed_data(data)


@dataclass(slots=True)
class Line:
    """One connection."""

    reader: TimedReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0

    @classmethod
    async def open(cls, port: int, receive_bytes: int = 0) -> Line:
        """`receive_bytes`: of the kernel's buffer; 0: as usual."""
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await loop.sock_connect(sock, (HOST, port))
        except BaseException:
            sock.close()
            raise
        reader = TimedReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def close(self) -> None:
        self.writer.transport.abort()


class Lines:
    """Connections kept for the next request, oldest first."""

    def __init__(self, port: int, *, keep: bool = True) -> None:
        self.port = port
        self._keep = keep
        self._spare: deque[Line] = deque()

    async def take(self) -> Line:
        while self._spare:
            line = self._spare.popleft()
            if time.monotonic() - line.idle_since < _SPARE_FOR_S and not line.reader.at_eof():
                line.reader.restart()
                return line
            line.close()
        return await Line.open(self.port)

    def give_back(self, line: Line) -> None:
        if not self._keep:
            line.close()
            return
        line.idle_since = time.monotonic()
        self._spare.append(line)

    def close(self) -> None:
        while self._spare:
            self._spare.pop().close()


@contextlib.contextmanager
def closing(lines: Lines) -> Iterator[Lines]:
    try:
        yield lines
    finally:
        lines.close()


async def _answer(line: Line, message: bytes, *, slowly: bool = False) -> Answer | None:
    line.writer.write(message)
    if not slowly:
        return await read_answer(line.reader)
    assert isinstance(line.writer.transport, asyncio.Transport)
    braking = asyncio.create_task(_brake(line.writer.transport))
    try:
        return await read_answer(line.reader)
    finally:
        braking.cancel()


async def _brake(transport: asyncio.Transport) -> None:
    """Let something through five times a second."""
    while not transport.is_closing():
        transport.pause_reading()
        await asyncio.sleep(_SLOW_PAUSE_S)
        transport.resume_reading()
        await asyncio.sleep(0.001)


async def exchange(lines: Lines, ask: Ask, manner: Manner, patience_s: float = ENDS_WITHIN_S) -> Ending:
    """Send a request and see it to its end. `patience_s`: when a client that hangs up does so."""
    sent, first, line = time.monotonic(), None, None
    fate, detail, text = Fate.LOST, "", ""
    slowly = manner is Manner.READS_SLOWLY
    limit_s = patience_s if manner is Manner.HANGS_UP else ENDS_WITHIN_S
    try:
        line = await (Line.open(lines.port, _SLOW_BYTES) if slowly else lines.take())
        answer = await asyncio.wait_for(_answer(line, ask.message, slowly=slowly), limit_s)
        first = line.reader.first_at
        fate, detail = judge(ask.path, answer)
        text = text_of(answer) if answer is not None and fate is Fate.FINISHED else ""
        if answer is not None and answer.whole and not answer.closes and not slowly:
            lines.give_back(line)
            line = None
    except asyncio.TimeoutError:
        hung_up = manner is Manner.HANGS_UP
        fate, detail = (
            (Fate.CANCELLED, "") if hung_up else (Fate.LOST, f"no end within {ENDS_WITHIN_S:.0f} s")
        )
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        detail = f"{type(error).__name__}: {error}"
    finally:
        if line is not None:
            line.close()
    return Ending(manner, ask.dialect, fate, detail, sent, first, time.monotonic(), ask, text)


async def spoil(port: int, number: int, seed: int) -> Ending:
    """Send a spoilt body; it is lost only when it gets no proper answer although one is owed."""
    dialect = list(GOOD)[number % len(GOOD)]
    case = make_case(dialect, number, seed)
    sent, first, line = time.monotonic(), None, None
    try:
        line = await Line.open(port)
        line.writer.write(case.message)
        if not case.framed:
            line.writer.write_eof()
        answer = await asyncio.wait_for(read_answer(line.reader), ENDS_WITHIN_S)
        first = line.reader.first_at
        wrong = [] if answer is not None and answer.status == 503 else faults(case, answer)
        failed = bool(wrong) and (wrong[0].startswith(STREAM_FAILED) or wrong[0].startswith("status 5"))
        fate = Fate.ERROR if failed else Fate.LOST if wrong else Fate.REFUSED
        if answer is not None and answer.status == 200 and not wrong:
            fate = Fate.FINISHED
        detail = f"{dialect}:{number}: {wrong[0]}" if wrong else ""
    except (OSError, ValueError, asyncio.TimeoutError, asyncio.IncompleteReadError) as error:
        owed = case.framed and not isinstance(error, ConnectionResetError)
        fate = Fate.LOST if owed else Fate.REFUSED
        detail = f"{dialect}:{number}: {type(error).__name__}: {error}"
    finally:
        if line is not None:
            line.close()
    return Ending(Manner.SPOILS, dialect, fate, detail, sent, first, time.monotonic())


# --- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the clients that do not just read to the end."""

    hang_up: float = 0.1
    slow: float = 0.04
    spoil: float = 0.06
    typical_s: float = 1.0  # within twice of that, clients that hang up do so

    def manner(self, rng: random.Random) -> Manner:
        drawn = rng.random()
        for manner, share in (
            (Manner.HANGS_UP, self.hang_up),
            (Manner.READS_SLOWLY, self.slow),
            (Manner.SPOILS, self.spoil),
        ):
            if drawn < share:
                return manner
            drawn -= share
        return Manner.READS


class Load:
    """A stream of mixed requests against one port; the same for the same seed but for its times."""

    def __init__(
        self,
        lines: Lines,
        ledger: Ledger,
        mix: Mix,
        seed: int,
        make: Callable[[random.Random], Ask] = make_ask,
    ) -> None:
        self._lines = lines
        self.ledger = ledger
        self._mix = mix
        self._seed = seed
        self._rng = random.Random(seed)
        self._make = make
        self._number = 0
        self._under_way: set[asyncio.Task[None]] = set()

    async def one(self) -> None:
        """Draw a request, send it, enter its end."""
        rng, mix = self._rng, self._mix
        manner, self._number = mix.manner(rng), self._number + 1
        ask, patience_s = self._make(rng), rng.uniform(0.0, 2 * mix.typical_s)
        self.ledger.sent += 1
        if manner is Manner.SPOILS:
            ending = await spoil(self._lines.port, self._number, self._seed)
        else:
            ending = await exchange(self._lines, ask, manner, patience_s)
        self.ledger.endings.append(ending)

    async def closed(self, clients: int, seconds: float) -> float:
        """Each client sends its next request when its last has ended: requests per second."""
        start, before = time.monotonic(), len(self.ledger.endings)

        async def client() -> None:
            while time.monotonic() < start + seconds:
                await self.one()

        await asyncio.gather(*(client() for _ in range(clients)))
        return (len(self.ledger.endings) - before) / (time.monotonic() - start)

    async def paced(self, rate: float, seconds: float, running: Callable[[], bool] = lambda: True) -> None:
        """Poisson arrivals at `rate` per second, however the answers do; returns with all of them ended."""
        now = time.monotonic()
        until, due = now + seconds, now
        while due < until and running():
            due += self._rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.one())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await asyncio.gather(*self._under_way)
