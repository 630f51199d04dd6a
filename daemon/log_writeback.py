"""Writes the three values of LogConfig back into config.json, and changes nothing else in the file."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.settings import LogSettings

_BLANK = re.compile(r"[ \t\r\n]*")
_BOM = "\ufeff"


class _Member(NamedTuple):
    name: str
    start: int  # of its value
    end: int


def write_log_settings(path: Path, settings: LogSettings) -> None:
    """Replace the file by one with these values, atomically and with the same mode and owner.

    Raises OSError when it may not be written, ValueError when it has no LogConfig object (any more).
    """
    real = path.resolve()  # a link stays a link
    info = real.stat()
    if not info.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{real} is read-only")  # root could write it, but somebody did not want that
    text = real.read_bytes().decode("utf-8")
    handle, name = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(with_log_settings(text, settings).encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, stat.S_IMODE(info.st_mode))
        if (info.st_uid, info.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(name, info.st_uid, info.st_gid)
        os.replace(name, real)
    except BaseException:
        os.unlink(name)
        raise


def with_log_settings(text: str, settings: LogSettings) -> str:
    """`text`, a JSON document, with other values in its LogConfig. Raises ValueError when there is none."""
    wanted = {
        "dynamicLogLevel": settings.dynamic_level,
        "dynamicLogLevelValidHours": settings.valid_hours,
        "dynamicLogLevelValidTime": settings.valid_time,
    }
    section = next(
        (m for m in _members(text, _skip(text, text.startswith(_BOM))) if m.name == "LogConfig"), None
    )
    if section is None or text[section.start] != "{":
        raise ValueError("no LogConfig object")
    members = {member.name: member for member in _members(text, section.start)}
    if not members:
        raise ValueError("LogConfig is empty")
    last = max(member.end for member in members.values())
    edits = [
        (last, last, f', "{name}": {json.dumps(wanted[name])}') for name in wanted if name not in members
    ]
    for name, value in wanted.items():
        if name in members:
            edits.append((members[name].start, members[name].end, json.dumps(value)))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _members(text: str, start: int) -> Iterator[_Member]:
    """Of the object whose brace opens at `start`, in a document that has been parsed before."""
    decoder = json.JSONDecoder()
    at = _skip(text, start + 1)
    while text[at] != "}":
        name, at = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, at) + 1)
        _, at = decoder.raw_decode(text, value)
        yield _Member(name, value, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at
