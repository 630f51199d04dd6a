"""The logging of one process: opened by the parent, opened again by every child, closed at its end.

The console (stderr, hence output.log) gets what is logged about the server and the engine, as it happens.
Files get that too, and what is logged about requests; there a thread writes, except in the parent.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from engine.logs import NEVER_ON_STDERR, NEVER_ON_STDOUT, REQUESTS, TOKENS
from engine.logs.codes import code
from engine.logs.levels import LevelBoard, apply_levels
from engine.logs.lines import LineFormatter, audit_line, component_of, file_time, os_user
from engine.logs.options import COMPONENTS, LogOptions, Rotation, read_levels, read_options
from engine.logs.places import RotatingFile, Sink, StandardStream
from engine.logs.writer import Writer

_STEMS = {REQUESTS: "mindie-llm-request", TOKENS: "mindie-llm-token"}
_TOKEN_ROTATION = Rotation(1 << 20, 2)
_LAST_LINES_S = 1.0  # for writing what is queued when a process ends

_room: _Room | None = None  # logging is the process's, as it is in the standard library


def open_logs(environ: Mapping[str, str], *, to_files: bool = True) -> None:
    """In the parent, before anything is forked. Wrong variables are named and their defaults taken."""
    global _room
    options = read_options(environ)
    _room = _Room(options, LevelBoard(), "server", to_files=to_files)
    _room.install()
    for number, warning in options.warnings:
        logging.getLogger("logs").warning("%s", warning, extra=code(number))


def enter_child(component: str, *, reads_requests: bool) -> None:
    """In a child, right after the fork: files of its own, and a thread that writes them.

    `reads_requests`: exceptions may quote what clients sent, so what they say is left out.
    """
    global _room
    if _room is None:  # whoever forked us logs nothing: a test
        return
    _room.close()
    _room = _Room(
        _room.options,
        _room.board,
        component,
        to_files=_room.to_files,
        quotes_exceptions=not reads_requests,
    )
    _room.install()
    _room.writer.start()


def close_logs() -> None:
    """Write what is queued, for a moment at most; for the end of a process."""
    if _room is not None:
        _room.writer.end(_LAST_LINES_S)


def set_levels(text: str) -> None:
    """`debug`, or `llm:debug;server:info`: for every process, within two seconds. Call it in the parent.

    Components that are not named keep the level of the environment. Raises ValueError.
    """
    read_levels(text)
    _publish(text)


def reset_levels() -> None:
    """Back to the levels of the environment, in every process. Call it in the parent."""
    _publish("")


def audit(client: str, operation: str, result: str) -> None:
    """One line in the audit log, whatever the level. `client`: ip:port, or "system"."""
    if _room is not None:
        _room.audit(client, operation, result)


def announce(line: str) -> None:
    """The line as it is on standard output, for whoever watches it. Nobody is waited for."""
    if _room is not None and _room.stdout is not None:
        _room.stdout.write([_encoded(line)])


def lost_lines() -> int:
    """Lines of this process that were dropped since its start, because a place or the queue was full."""
    return _room.lost_lines() if _room is not None else 0


def _publish(text: str) -> None:
    if _room is not None:
        _room.board.publish(text)
        _room.follow_board()


class _Room:
    """What one process logs with."""

    def __init__(
        self,
        options: LogOptions,
        board: LevelBoard,
        component: str,
        *,
        to_files: bool,
        quotes_exceptions: bool = True,
    ) -> None:
        self.options = options
        self.board = board
        self.component = component
        self.to_files = to_files
        self.writer = Writer(self.follow_board)
        self.stdout = _standard_stream(1)
        self.stderr = _standard_stream(2)
        self._seen = -1  # change of levels
        self._started = file_time(time.time())
        self._user = os_user()
        self._files: dict[tuple[str, str, str], Sink] = {}  # by component, folder and stem
        self._by_path: dict[Path, Sink] = {}
        self.formatters = {
            name: LineFormatter(
                component, verbose=options.of[name].verbose, quotes_exceptions=quotes_exceptions
            )
            for name in COMPONENTS
        }
        self.console_formatter = LineFormatter(component, verbose=True, quotes_exceptions=quotes_exceptions)

    def install(self) -> None:
        handlers: list[logging.Handler] = [_FileHandler(self)]
        if self.stderr is not None:
            handlers.insert(0, _ConsoleHandler(self, self.stderr))
        logging.getLogger().handlers[:] = handlers
        self.follow_board()

    def follow_board(self) -> None:
        number, text = self.board.read()
        if number != self._seen:
            self._seen = number
            given = read_levels(text) if text else {}
            levels = {
                name: given.get(name, given.get("*", level)) for name, level in self.options.levels.items()
            }
            apply_levels(levels, self.component)

    def audit(self, client: str, operation: str, result: str) -> None:
        if self.to_files and self.options.of["server"].to_file:
            line = audit_line(self._user, client, operation, result)
            self.writer.put(self._file("server", "security", "mindie-server"), _encoded(line))

    def file_of(self, record: logging.LogRecord, component: str) -> Sink | None:
        """None when the component writes no files."""
        if not (self.to_files and self.options.of[component].to_file):
            return None
        if component == "server":
            component = self.component  # what a worker says about itself belongs to its other lines
        stem = _STEMS.get(record.name) or ("mindie-server" if component == "server" else "mindie-llm")
        return self._file(component, "debug", stem)

    def _file(self, component: str, folder: str, stem: str) -> Sink:
        key = (component, folder, stem)
        if key not in self._files:
            options = self.options.of[component]
            place = options.folder / folder
            rotation = _TOKEN_ROTATION if stem == _STEMS[TOKENS] else options.rotation
            # llm and llmmodels share a file where their paths are the same
            shared = self._by_path.get(place / stem)
            self._files[key] = self._by_path[place / stem] = shared or Sink(
                RotatingFile(place, f"{stem}_{os.getpid()}_{self._started}", rotation)
            )
        return self._files[key]

    @property
    def _sinks(self) -> list[Sink]:
        return [*filter(None, (self.stdout, self.stderr)), *self._by_path.values()]

    def lost_lines(self) -> int:
        return self.writer.lost + sum(sink.lost for sink in self._sinks)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class _ConsoleHandler(logging.Handler):
    """Standard error. Written by whoever logs, without waiting: so nothing is missing there after a crash.

    A component whose lines go to standard output shows here only what explains an end.
    """

    def __init__(self, room: _Room, sink: Sink) -> None:
        super().__init__()
        self._room = room
        self._sink = sink
        self._is_stdout = room.stdout is not None and os.path.sameopenfile(1, 2)  # 2>&1

    def emit(self, record: logging.LogRecord) -> None:
        if record.name in NEVER_ON_STDERR:
            return
        component = component_of(record, self._room.component)
        if self._room.options.of[component].to_stdout and (record.levelno < logging.ERROR or self._is_stdout):
            return
        self._sink.write([_encoded(self._room.console_formatter.format(record))])


class _FileHandler(logging.Handler):
    """The file of the record's component, and standard output where the operator wants it."""

    def __init__(self, room: _Room) -> None:
        super().__init__()
        self._room = room

    def emit(self, record: logging.LogRecord) -> None:
        room = self._room
        component = component_of(record, room.component)
        file = room.file_of(record, component)
        to_stdout = room.options.of[component].to_stdout and record.name not in NEVER_ON_STDOUT
        if file is None and not to_stdout:
            return
        line = _encoded(room.formatters[component].format(record))
        urgent = record.levelno >= logging.WARNING
        if file is not None:
            room.writer.put(file, line, urgent=urgent)
        if to_stdout and room.stdout is not None:
            room.writer.put(room.stdout, line, urgent=urgent)


def _standard_stream(fd: int) -> Sink | None:
    """None when the process was started without it."""
    if (sys.stdout if fd == 1 else sys.stderr) is None:
        return None
    return Sink(StandardStream(fd, "standard output" if fd == 1 else "standard error"))


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode("utf-8", "backslashreplace")
