"""Logging to stderr in the format operators know; `nohup ... 2>&1` puts it into output.log."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping

_COMPONENTS = ("llm", "llmmodels", "server")
LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL")

logging.addLevelName(logging.WARNING, "WARN")

# clients choose names and paths that end up in messages: they must neither begin a line nor steer a terminal
_CONTROLS = {ord("\n"): " ", 0x2028: "\\u2028", 0x2029: "\\u2029"} | {
    code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if code != ord("\n")
}


class _Formatter(logging.Formatter):
    """`[time] [pid] [tid] [component] [LEVEL] [file-line] : message` on one line, then a traceback's."""

    def format(self, record: logging.LogRecord) -> str:
        component = record.name.partition(".")[0]
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).split("\n")
        text = "\n  ".join(line.translate(_CONTROLS) for line in lines)
        when = f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}.{int(record.msecs):03d}"
        return (
            f"[{when}] [{os.getpid()}] [{threading.get_native_id()}] [{component}] [{record.levelname}] "
            f"[{record.filename}-{record.lineno}] : {text}"
        )


def set_up_logging(environ: dict[str, str]) -> None:
    """Install the one handler; a bad MINDIE_LOG_LEVEL is named and replaced by INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    wanted = environ.get("MINDIE_LOG_LEVEL", "INFO").upper()
    if wanted in LEVELS:
        root.setLevel(wanted)
        return
    root.setLevel("INFO")
    logging.getLogger("server").warning(
        "MINDIE_LOG_LEVEL=%r is not a level; allowed: %s; using INFO", wanted, ", ".join(LEVELS)
    )


def set_levels(text: str, environ: Mapping[str, str]) -> None:
    """Levels of this process: `debug`, or `llm:debug;server:info`; "" = what the environment says."""
    standard = environ.get("MINDIE_LOG_LEVEL", "INFO").upper()
    levels = dict.fromkeys(("", *_COMPONENTS), standard if standard in LEVELS else "INFO")
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, level = part.rpartition(":")
        names = _COMPONENTS if name.strip() in ("", "*") else (name.strip(),)
        levels |= dict.fromkeys(names if colon else ("", *names), level.strip().upper())
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
