"""How a line looks: the verbose, the simple and the audit form, one event on one line."""

from __future__ import annotations

import logging
import os
import pwd
import threading
import time
import traceback
from functools import lru_cache

from engine.logs.codes import code_of
from engine.logs.options import COMPONENTS

logging.addLevelName(logging.WARNING, "WARN")

# clients choose names and paths that end up in messages: they must neither begin a line nor steer a terminal
_CONTROLS = {ord("\n"): " ", 0x2028: "\\u2028", 0x2029: "\\u2029"} | {
    code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if code != ord("\n")
}


def component_of(record: logging.LogRecord, own: str) -> str:
    """The component of a record; libraries speak for the process they are loaded in, whose one is `own`."""
    name = record.name.partition(".")[0]
    return name if name in COMPONENTS else own


def escaped(text: str) -> str:
    """`text` on one line, without control characters."""
    return text if text.isprintable() else text.translate(_CONTROLS)  # asking first: 0.1 us instead of 1


class LineFormatter(logging.Formatter):
    """`[time] [pid] [tid] [component] [LEVEL] [file-line] : [code ]message`, then an indented traceback.

    The simple form is `[time] : [LEVEL] [code ]message`. What an exception says of itself is left out where
    requests are handled: it may quote them.
    """

    def __init__(self, own: str, *, verbose: bool, quotes_exceptions: bool) -> None:
        """`own`: the component of the process."""
        super().__init__()
        self._own = own
        self._verbose = verbose
        self._quotes_exceptions = quotes_exceptions

    def format(self, record: logging.LogRecord) -> str:
        component = component_of(record, self._own)
        code = code_of(record, component)
        lines = [(f"[{code}] " if code else "") + _message(record)]
        if record.exc_info and record.exc_info[1] is not None:
            lines += self._traceback(record.exc_info[1])
        text = "\n  ".join(map(escaped, lines))
        when = timestamp(record.created)
        if not self._verbose:
            return f"[{when}] : [{record.levelname}] {text}"
        return (
            f"[{when}] [{record.process}] [{threading.get_native_id()}] [{component}] [{record.levelname}] "
            f"[{record.filename}-{record.lineno}] : {text}"
        )

    def _traceback(self, error: BaseException) -> list[str]:
        if self._quotes_exceptions:
            return "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
        origin = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return [
            *(self._traceback(origin) if origin is not None else ()),
            "Traceback (most recent call last):",
            *"".join(traceback.format_tb(error.__traceback__)).rstrip("\n").split("\n"),
            f"{type(error).__name__} (its text is left out: it may quote the request)",
        ]


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, LookupError):  # a mistake of ours, which is no reason to lose the line
        return f"{record.msg} (its arguments do not fit)"


def timestamp(seconds: float) -> str:
    """Local time to the millisecond, as in 2026-01-31 12:00:00.000."""
    return f"{_to_the_second(int(seconds))}.{int(seconds % 1 * 1000):03d}"


@lru_cache(maxsize=2)  # lines come in time's order, many in a second
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def file_time(seconds: float) -> str:
    """The same as names of files have it: YYYYMMDDhhmmssmmm."""
    return f"{time.strftime('%Y%m%d%H%M%S', time.localtime(seconds))}{int(seconds % 1 * 1000):03d}"


def audit_line(user: str, client: str, operation: str, result: str) -> str:
    """`[time] [os user] [client ip:port or system] [server] [operation] [result]`."""
    return f"[{timestamp(time.time())}] [{user}] [{client}] [server] [{escaped(operation)}] [{result}]"


def os_user() -> str:
    """The name of the account we run under, its number when it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
