"""LogConfig: never fatal, bad values give way to the last good ones."""

from __future__ import annotations

import pytest

from daemon.log_settings import DEFAULT_LOG, read_log_settings
from engine.settings import LogSettings

LAST = LogSettings("debug", 5, "2025-01-02 03:04:05")


@pytest.mark.parametrize(
    "level", ["", "debug", "ERROR", "llm:debug", "llm:debug;server:info", "*: warn ; llmmodels:info"]
)
def test_levels(level: str) -> None:
    settings, warnings = read_log_settings({"dynamicLogLevel": level})
    assert (settings.dynamic_level, warnings) == (level, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dynamicLogLevel", "loud"),
        ("dynamicLogLevel", "kernel:debug"),
        ("dynamicLogLevel", 3),
        ("dynamicLogLevelValidHours", 0),
        ("dynamicLogLevelValidHours", 169),
        ("dynamicLogLevelValidHours", True),
        ("dynamicLogLevelValidTime", "tomorrow"),
        ("dynamicLogLevelValidTime", None),
    ],
)
def test_bad_value_is_replaced_by_the_last_good_one(key: str, value: object) -> None:
    good = {
        "dynamicLogLevel": LAST.dynamic_level,
        "dynamicLogLevelValidHours": LAST.valid_hours,
        "dynamicLogLevelValidTime": LAST.valid_time,
    }
    settings, warnings = read_log_settings({**good, key: value}, LAST)
    assert settings == LAST
    assert len(warnings) == 1 and warnings[0].startswith(f"LogConfig.{key}=")


def test_missing_section_and_missing_keys_are_defaults() -> None:
    assert read_log_settings(None, LAST) == (DEFAULT_LOG, [])
    assert read_log_settings({}, LAST) == (DEFAULT_LOG, [])


def test_wrong_section_keeps_everything() -> None:
    settings, warnings = read_log_settings([], LAST)
    assert settings == LAST and len(warnings) == 1
