"""Writes lines beside the work: a bounded queue and one thread, so that no disk holds up a request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from engine.logs.codes import LOG_OVERFLOWED, code
from engine.logs.places import Sink

log = logging.getLogger("logs")  # speaks for the process, whichever it is

_QUEUE_BYTES = 4 << 20
_GATHER_S = 0.1  # lines of so long are written together, unless one of them is urgent
_LOOK_S = 1.0  # how often `on_turn` is called when nothing is to be written


class Writer:
    """Writes at once until `start`, from then on in its thread. The parent, which forks, never starts it."""

    def __init__(self, on_turn: Callable[[], None]) -> None:
        self._on_turn = on_turn
        self._lines: list[tuple[Sink, bytes]] = []
        self._bytes = 0
        self._overflowed = 0
        self.lost = 0  # lines that found no room, since the start
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, sink: Sink, line: bytes, *, urgent: bool = False) -> None:
        """Never waits. `urgent`: to be written at once, the process may not live long."""
        if self._thread is None:
            sink.write([line])
            return
        with self._lock:
            if self._bytes + len(line) > _QUEUE_BYTES:
                self._overflowed += 1
                self.lost += 1
                return
            self._lines.append((sink, line))
            self._bytes += len(line)
        if not self._wake.is_set():
            self._wake.set()
        if urgent:
            self._hurry.set()

    def end(self, limit_s: float) -> None:
        """Write what is there, for so long at most."""
        if self._thread is None:
            return
        self._ending = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while not self._ending:
            if self._wake.wait(_LOOK_S):
                self._hurry.wait(_GATHER_S)
                self._wake.clear()
                self._hurry.clear()
                self._flush()
            self._on_turn()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
            self._bytes = 0
            overflowed, self._overflowed = self._overflowed, 0
        batches: dict[Sink, list[bytes]] = {}
        for sink, line in lines:
            batches.setdefault(sink, []).append(line)
        for sink, batch in batches.items():
            sink.write(batch)
        if overflowed:
            log.warning(
                "%d lines were lost: they came faster than the files take them",
                overflowed, extra=code(LOG_OVERFLOWED),
            )  # fmt: skip
