"""The error codes of WARN, ERROR and CRITICAL lines: `MIE04E020205`, stable, to be searched for.

MIE, two digits for the component, W or E, two for the part that speaks, four for what it says. A part whose
lines are not told apart says 0000.
"""

from __future__ import annotations

import logging

COMPONENT_DIGITS = {"server": "04", "llm": "05", "llmmodels": "06"}

# by logger; never renumber a row: operators have alarms on them. "00": a part without a row
PARTS = {
    "server.main": "01",
    "server.supervisor": "02",
    "server.child": "03",
    "server.endpoint": "04",
    "server.http": "05",
    "server.health": "06",
    "server.engine_client": "07",
    "server.adapters": "08",
    "server.aiohttp": "09",
    "server.rundir": "10",
    "server.start": "11",
    "llm.worker": "01",
    "llm.core": "02",
    "llm.scheduler": "03",
    "llm.platform": "04",
    "llm.masks": "05",
    "llm.mock": "06",
    "llm.link": "07",
    "llmmodels.runner": "01",
    "llmmodels.lora": "02",
    "logs": "90",  # of every component
}

# what a part says, for `extra=code(...)`
LOG_VARIABLE_WRONG = 1  # of logs
LOG_VARIABLE_REMOVED = 2
LOG_REFUSED = 3
LOG_RECOVERED = 4
LOG_OVERFLOWED = 5
REQUEST_FAILED = 1  # of server.http
STREAM_FAILED = 2
FIRST_TOKEN_LATE = 1  # of llm.scheduler


def code(number: int) -> dict[str, int]:
    """The `extra` of a logging call."""
    return {"code": number}


def code_of(record: logging.LogRecord, component: str) -> str:
    """What stands between the brackets, "" below WARN."""
    if record.levelno < logging.WARNING:
        return ""
    letter = "W" if record.levelno < logging.ERROR else "E"
    part = PARTS.get(record.name, "00")
    return f"MIE{COMPONENT_DIGITS[component]}{letter}{part}{getattr(record, 'code', 0):04d}"
