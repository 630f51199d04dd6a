"""The MINDIE_LOG_* variables: one value for all, or one per component, checked as a whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from engine.logs.codes import LOG_VARIABLE_REMOVED, LOG_VARIABLE_WRONG

COMPONENTS = ("llm", "llmmodels", "server")
LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL")

T = TypeVar("T")

_MIB = 1 << 20
_MAX_BYTES = 500 * _MIB
_PATH_MAX = 4096
_NAME_ROOM = 96  # of /debug/mindie-llm-request_<pid>_<datetime>.01.log
_LISTED = re.compile(r"\s*(\*|llm|llmmodels|server)\s*:(.*)", re.DOTALL)
_SWITCH = {"1": True, "true": True, "0": False, "false": False}
_REMOVED_FAMILIES = ("MIES_PYTHON_LOG_", "MINDIE_LLM_LOG_", "ATB_LOG_", "OCK_LOG_")
_REMOVED_NAMES = ("LOG_LEVEL", "LOG_TO_FILE")
_REPLACEMENTS = (  # by what an old name ends with
    ("LEVEL", "MINDIE_LOG_LEVEL"),
    ("TO_FILE", "MINDIE_LOG_TO_FILE"),
    ("TO_STDOUT", "MINDIE_LOG_TO_STDOUT"),
    ("PATH", "MINDIE_LOG_PATH"),
    ("VERBOSE", "MINDIE_LOG_VERBOSE"),
    ("", "MINDIE_LOG_ROTATE"),  # sizes and numbers of files
)


@dataclass(frozen=True, slots=True)
class Rotation:
    max_bytes: int  # of one file
    files: int  # the current one and its backups

    def __str__(self) -> str:
        return f"-fs {self.max_bytes / _MIB:g} -r {self.files}"


@dataclass(frozen=True, slots=True)
class ComponentOptions:
    level: str  # of LEVELS
    to_file: bool
    to_stdout: bool
    verbose: bool
    folder: Path  # has debug/ and security/ below it; absolute
    rotation: Rotation


@dataclass(frozen=True, slots=True)
class LogOptions:
    of: Mapping[str, ComponentOptions]  # by component
    warnings: tuple[tuple[int, str], ...]  # codes and texts, to be logged once the log is open

    @property
    def levels(self) -> dict[str, str]:
        return {component: options.level for component, options in self.of.items()}


def read_levels(text: str) -> dict[str, str]:
    """Levels by component, or by "*" for all that are not named. Raises ValueError for anything else."""
    return {component: _level(value) for component, value in _by_component(text).items()}


def read_options(environ: Mapping[str, str]) -> LogOptions:
    """Never fails: a wrong value is named in `warnings` and its default taken."""
    reader = _Reader(environ)
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    levels = reader.read("MINDIE_LOG_LEVEL", _level, "INFO", ", ".join(LEVELS))
    to_file = reader.read("MINDIE_LOG_TO_FILE", _switch, True, "0, 1, true, false")
    to_stdout = reader.read("MINDIE_LOG_TO_STDOUT", _switch, False, "0, 1, true, false")
    verbose = reader.read("MINDIE_LOG_VERBOSE", _switch, True, "0, 1, true, false")
    folders = reader.read(
        "MINDIE_LOG_PATH",
        lambda text: _folder(text, home),
        home / "mindie" / "log",
        f"a path of at most {_PATH_MAX - _NAME_ROOM} bytes",
    )
    max_bytes = reader.read("PYTHON_LOG_MAXSIZE", _old_max_bytes, 20 * _MIB, f"bytes, [0, {_MAX_BYTES}]")
    default = Rotation(max_bytes["server"], 10)
    rotations = reader.read(
        "MINDIE_LOG_ROTATE",
        lambda text: _rotation(text, default),
        default,
        "-fs MB [1, 500] and -r FILES [1, 64]",
    )
    if environ.get("PYTHON_LOG_MAXSIZE"):
        reader.warnings.append((LOG_VARIABLE_REMOVED, "PYTHON_LOG_MAXSIZE is old; use MINDIE_LOG_ROTATE"))
    reader.warn_of_removed()
    options = {
        name: ComponentOptions(
            levels[name], to_file[name], to_stdout[name], verbose[name], folders[name], rotations[name]
        )
        for name in COMPONENTS
    }
    return LogOptions(options, tuple(reader.warnings))


class _Reader:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.warnings: list[tuple[int, str]] = []

    def read(self, name: str, read: Callable[[str], T], default: T, allowed: str) -> dict[str, T]:
        text = self._environ.get(name, "")
        given: dict[str, T] = {}
        if text.strip():
            try:
                given = {component: read(value) for component, value in _by_component(text).items()}
            except ValueError:
                self.warnings.append(
                    (
                        LOG_VARIABLE_WRONG,
                        f"{name}={text[:200]!r} is not understood; allowed: {allowed}, or such values per "
                        f"component as in llm:...;server:...;*:...; using {default}",
                    )
                )
        return {component: given.get(component, given.get("*", default)) for component in COMPONENTS}

    def warn_of_removed(self) -> None:
        found = [
            f"{name} (use {next(new for end, new in _REPLACEMENTS if name.endswith(end))})"
            for name in sorted(self._environ)
            if name in _REMOVED_NAMES or name.startswith(_REMOVED_FAMILIES)
        ]
        if found:
            self.warnings.append((LOG_VARIABLE_REMOVED, f"no longer read: {', '.join(found)}"))


def _by_component(text: str) -> dict[str, str]:
    """`v`, or `llm:v;server:v;*:v`. Raises ValueError when some pieces name a component and others do not."""
    if _LISTED.match(text) is None:
        return {"*": text.strip()}
    found = {}
    for piece in filter(str.strip, text.split(";")):
        named = _LISTED.fullmatch(piece)
        if named is None:
            raise ValueError(piece)
        found[named[1]] = named[2].strip()
    return found


def _level(text: str) -> str:
    if text.upper() not in LEVELS:
        raise ValueError(text)
    return text.upper()


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(text)
    return _SWITCH[text.lower()]


def _folder(text: str, home: Path) -> Path:
    """Where debug/ and security/ lie: below an absolute path in log/, else below ~/mindie/log/<path>."""
    if text == "~" or text.startswith("~/"):
        text = f"{home}{text[1:]}"
    path = Path(text) / "log" if text.startswith("/") else home / "mindie" / "log" / text
    if "\0" in text or len(os.fsencode(path)) > _PATH_MAX - _NAME_ROOM:
        raise ValueError(text)
    return path


def _rotation(text: str, default: Rotation) -> Rotation:
    words = text.split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    if not given.keys() <= {"-fs", "-r"} or len(given) * 2 != len(words):
        raise ValueError(text)
    return Rotation(
        _within(given["-fs"], 1, 500) * _MIB if "-fs" in given else default.max_bytes,
        _within(given["-r"], 1, 64) if "-r" in given else default.files,
    )


def _old_max_bytes(text: str) -> int:
    return _within(text, 0, _MAX_BYTES) or 20 * _MIB  # 0: the default, not a file without an end


def _within(text: str, low: int, high: int) -> int:
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if not low <= value <= high:
        raise ValueError(text)
    return value
