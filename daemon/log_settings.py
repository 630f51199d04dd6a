"""The LogConfig section. It may change while the service runs, so bad values never refuse anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from daemon.config_report import shown
from engine.settings import LogSettings

DEFAULT_LOG = LogSettings(dynamic_level="", valid_hours=2, valid_time="")

_LEVEL = r"(?i:debug|info|warn|error|critical)"
_PAIR = rf"\s*(\*|llm|llmmodels|server)\s*:\s*{_LEVEL}\s*"
_LEVELS = re.compile(rf"|{_LEVEL}|{_PAIR}(;{_PAIR})*;?")


def _is_level(value: object) -> bool:
    return isinstance(value, str) and _LEVELS.fullmatch(value) is not None


def _is_hours(value: object) -> bool:
    return type(value) is int and 1 <= value <= 168


def _is_time(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return value == "" or datetime.strptime(value, "%Y-%m-%d %H:%M:%S") is not None
    except ValueError:
        return False


class _Field(NamedTuple):
    key: str
    slot: str
    is_good: Callable[[object], bool]
    allowed: str


_FIELDS = (
    _Field(
        "dynamicLogLevel", "dynamic_level", _is_level, '"", a level, or component:level pairs joined by ;'
    ),
    _Field("dynamicLogLevelValidHours", "valid_hours", _is_hours, "[1, 168]"),
    _Field("dynamicLogLevelValidTime", "valid_time", _is_time, '"" or YYYY-MM-DD HH:MM:SS'),
)


def read_log_settings(section: Any, last_good: LogSettings = DEFAULT_LOG) -> tuple[LogSettings, list[str]]:
    """The slice, and a warning for each value that had to be replaced by the last good one.

    `section` is whatever LogConfig held; None means that the file has no such section.
    """
    if section is None:
        return DEFAULT_LOG, []
    if not isinstance(section, dict):
        return last_good, [f"LogConfig={shown(section)}: not an object, ignored"]
    slots: dict[str, Any] = {}
    warnings = []
    for field in _FIELDS:
        value = section.get(field.key, getattr(DEFAULT_LOG, field.slot))
        if not field.is_good(value):
            kept = getattr(last_good, field.slot)
            warnings.append(
                f"LogConfig.{field.key}={shown(value)}: {shown(kept)} is used instead; "
                f"allowed: {field.allowed}"
            )
            value = kept
        slots[field.slot] = value
    return LogSettings(**slots), warnings
