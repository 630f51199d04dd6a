"""Tries every distinct grammar out once, before a request with it reaches the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endpoint.bounds import Bounds
from engine.errors import InvalidRequest, ServiceUnavailable
from engine.grammar_limits import PARSER_LIMITS

_PROGRAM = Path(__file__).with_name("grammar_sandbox.py")
_AT_ONCE = 2  # grammars tried out at the same time; each takes a processor for two seconds at most
_WAIT_S = 30.0  # for an answer that has stopped coming; the sandbox itself ends a trial long before
_CACHE_BYTES = 16 << 20
_ENTRY_BYTES = 300  # of a verdict, besides its texts
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar is compiled against."""

    tokenizer: str  # the JSON of a tokenizers.Tokenizer
    n_vocab: int
    eos: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Verdict:
    error: str  # "": none
    translated: str  # as the engine takes it; "": as it came

    @property
    def size(self) -> int:
        return _ENTRY_BYTES + len(self.error) + len(self.translated)


@dataclass(slots=True, eq=False)
class _Trial:
    """A grammar that is being tried out, or stands in line for it."""

    task: asyncio.Task[_Verdict]
    num_waiting: int = 0  # requests that want the verdict
    begun: bool = False


class GrammarChecker:
    """One per endpoint process; its sandbox starts with the first grammar. Lives on the event loop."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], cache_bytes: int = _CACHE_BYTES) -> None:
        self._vocabulary = vocabulary
        self._cache_bytes = cache_bytes
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._size = 0
        self._pending: dict[bytes, _Trial] = {}
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._starting = asyncio.Lock()
        self._sandbox: _Sandbox | None = None
        self.num_trials = 0

    async def check(self, grammar: str, field: str) -> str:
        """The grammar as the engine takes it. `field`: where it came from.

        Raises InvalidRequest when no answer can follow it, or only at a cost that is not for one request.
        """
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await self._tried(key, grammar)
        else:
            self._verdicts.move_to_end(key)
        if verdict.error:
            raise InvalidRequest(
                f"`{field}` cannot be followed: {verdict.error}; simplify or correct it, or leave it out"
            )
        return verdict.translated or grammar

    def register_bounds(self, bounds: Bounds, max_requests: Callable[[], int]) -> None:
        """`max_requests`: each waits for one trial at most."""
        bounds.register("grammar_cache_bytes", lambda: self._size, self._cache_bytes)
        bounds.register("grammar_trials", lambda: len(self._pending), max_requests)

    async def close(self) -> None:
        for trial in list(self._pending.values()):
            trial.task.cancel()
        if self._sandbox is not None:
            await self._sandbox.close()

    async def _tried(self, key: bytes, grammar: str) -> _Verdict:
        trial = self._pending.get(key)
        if trial is None:
            trial = self._pending[key] = _Trial(asyncio.create_task(self._try_out(key, grammar)))
        trial.num_waiting += 1
        try:
            # a client that hangs up must not take the verdict from the others who wait for it
            return await asyncio.shield(trial.task)
        finally:
            trial.num_waiting -= 1
            if not trial.num_waiting and not trial.begun:  # nor leave a line of trials that nobody wants
                self._pending.pop(key, None)
                trial.task.cancel()

    async def _try_out(self, key: bytes, grammar: str) -> _Verdict:
        async with self._turns:
            trial = self._pending[key]
            trial.begun = True
            try:
                answer = await (await self._running_sandbox()).ask(grammar)
            finally:
                del self._pending[key]
        self.num_trials += 1
        translated = answer.get("grammar", "")
        verdict = _Verdict(answer.get("error", ""), "" if translated == grammar else translated)
        self._verdicts[key] = verdict
        self._size += verdict.size
        while self._size > self._cache_bytes:
            self._size -= self._verdicts.popitem(last=False)[1].size
        return verdict

    async def _running_sandbox(self) -> _Sandbox:
        async with self._starting:
            if self._sandbox is None or not self._sandbox.alive:
                vocabulary = await asyncio.to_thread(self._vocabulary)
                try:
                    self._sandbox = await _Sandbox.start(vocabulary)
                except OSError:  # no process or descriptor is left, or it has ended at once
                    raise _ended() from None
            return self._sandbox


class _Sandbox:
    """Our end of a running grammar_sandbox."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._requests, self._answers = process.stdin, process.stdout
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, vocabulary: Vocabulary) -> _Sandbox:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(_PROGRAM), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        sandbox = cls(process)
        await sandbox._send({**asdict(vocabulary), "limits": PARSER_LIMITS})
        return sandbox

    @property
    def alive(self) -> bool:
        return not self._reader.done()

    async def ask(self, grammar: str) -> dict[str, Any]:
        """Raises ServiceUnavailable when no verdict comes."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send({"id": number, "grammar": grammar})
            return await asyncio.wait_for(answer, _WAIT_S)
        except (OSError, asyncio.TimeoutError):
            self._kill()
            raise _ended() from None
        finally:
            del self._waiting[number]

    async def close(self) -> None:
        self._kill()
        await self._process.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _send(self, frame: dict[str, Any]) -> None:
        body = json.dumps(frame).encode()
        self._requests.write(_LENGTH.pack(len(body)) + body)
        await self._requests.drain()

    async def _read(self) -> None:
        try:
            while True:
                head = await self._answers.readexactly(_LENGTH.size)
                answer = json.loads(await self._answers.readexactly(_LENGTH.unpack(head)[0]))
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except asyncio.IncompleteReadError:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(_ended())


def _ended() -> ServiceUnavailable:
    return ServiceUnavailable(
        "the process that tries grammars out has ended; send the request again", retry_after_s=1
    )
