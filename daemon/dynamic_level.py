"""The log level an operator sets for some hours while the service runs (LogConfig)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple

from engine.settings import LogSettings

_TIME = "%Y-%m-%d %H:%M:%S"
EXPIRED = LogSettings(dynamic_level="", valid_hours=2, valid_time="")


class Verdict(NamedTuple):
    level: str  # in force now; "" = as the environment says
    write_back: LogSettings | None  # what the file should say instead; None: it is right


class DynamicLevel:
    """Remembers since when a level holds, also where that cannot be written down."""

    def __init__(self) -> None:
        self._level: str | None = None  # None: nothing was looked at yet
        self._valid_time = ""  # as the file had it
        self._start = datetime.min

    def judge(self, wanted: LogSettings, now: datetime) -> Verdict:
        """What holds at `now`, local time, when the file says `wanted`.

        The time runs from dynamicLogLevelValidTime; a new level without a time, or one in the future, begins
        now. When it is over, the file loses level and time, and the hours become 2 again.
        """
        if wanted.dynamic_level == "":
            self._level, self._valid_time = "", wanted.valid_time
            return Verdict("", None)
        if self._is_new(wanted):
            self._start = self._beginning(wanted, now)
            self._level, self._valid_time = wanted.dynamic_level, wanted.valid_time
        if now >= self._start + timedelta(hours=wanted.valid_hours):
            return Verdict("", EXPIRED)
        since = self._start.strftime(_TIME)
        if since == wanted.valid_time:
            return Verdict(wanted.dynamic_level, None)
        return Verdict(wanted.dynamic_level, replace(wanted, valid_time=since))

    def _is_new(self, wanted: LogSettings) -> bool:
        return (wanted.dynamic_level, wanted.valid_time) != (self._level, self._valid_time)

    def _beginning(self, wanted: LogSettings, now: datetime) -> datetime:
        level_changed = self._level is not None and wanted.dynamic_level != self._level
        stale = level_changed and wanted.valid_time == self._valid_time  # left over from the level before
        if wanted.valid_time == "" or stale:
            return now.replace(microsecond=0)
        return min(datetime.strptime(wanted.valid_time, _TIME), now.replace(microsecond=0))
