"""The LogConfig section. It may change while the service runs, so bad values never refuse anything."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from daemon.config_report import shown
from engine.settings import LogSettings

DEFAULT_LOG = LogSettings(dynamic_level="", valid_hours=2, valid_time="")

_LEVEL = r"(?i:debug|info|warn|error|critical)"
_LEVELS = re.compile(rf"|{_LEVEL}|(\*|llm|llmmodels|server)\s*:\s*{_LEVEL}(\s*;\s*(\*|llm|llmmodels|server)\s*:\s*{_LEVEL})*;?")
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def read_log_settings(section: Any, last_good: LogSettings = DEFAULT_LOG) -> tuple[LogSettings, list[str]]:
    """The slice, and one warning for each value that was replaced by the last good one. No section: defaults."""
    if section is None:
        return DEFAULT_LOG, []
    if not isinstance(section, dict):
        return last_good, [f"LogConfig={shown(section)}: not an object, ignored"]
    warnings: list[str] = []

    def pick(key: str, default: Any, last: Any, good: bool, allowed: str) -> Any:
        if good:
            return section.get(key, default)
        warnings.append(f"LogConfig.{key}={shown(section[key])}: {shown(last)} is used instead; allowed: {allowed}")
        return last

    level, hours, time = (
        section.get(key, default)
        for key, default in (
            ("dynamicLogLevel", ""),
            ("dynamicLogLevelValidHours", 2),
            ("dynamicLogLevelValidTime", ""),
        )
    )
    settings = LogSettings(
        dynamic_level=pick(
            "dynamicLogLevel",
            "",
            last_good.dynamic_level,
            isinstance(level, str) and _LEVELS.fullmatch(level) is not None,
            '"", a level, or component:level pairs joined by ;',
        ),
        valid_hours=pick(
            "dynamicLogLevelValidHours",
            2,
            last_good.valid_hours,
            type(hours) is int and 1 <= hours <= 168,
            "[1, 168]",
        ),
        valid_time=pick(
            "dynamicLogLevelValidTime",
            "",
            last_good.valid_time,
            isinstance(time, str) and _is_time(time),
            '"" or YYYY-MM-DD HH:MM:SS',
        ),
    )
    return settings, warnings


def _is_time(text: str) -> bool:
    try:
        return text == "" or datetime.strptime(text, _TIME_FORMAT) is not None
    except ValueError:
        return False
