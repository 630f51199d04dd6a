"""Logging to stderr in the format operators know; `nohup ... 2>&1` puts it into output.log."""

from __future__ import annotations

import logging
import os
import sys
import threading

LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL")

logging.addLevelName(logging.WARNING, "WARN")


class _Formatter(logging.Formatter):
    """`[time] [pid] [tid] [component] [LEVEL] [file-line] : message`, always on one line."""

    def format(self, record: logging.LogRecord) -> str:
        component = record.name.partition(".")[0]
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        else:
            text = text.replace("\n", " ")
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
