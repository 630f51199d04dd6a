"""What validation has to say, collected until everything has been looked at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.errors import EXIT_CONFIG, StartupError
from engine.settings import ModelSettings, ScheduleSettings

_SHOWN_CHARS = 120


class AcceptedModel(NamedTuple):
    """What decides how much memory a model takes."""

    model: ModelSettings
    schedule: ScheduleSettings
    num_workers: int


class ConfigError(StartupError):
    """config.json cannot be used. The text is one line per finding, then the file and their number."""

    def __init__(
        self,
        findings: list[str],
        config_file: Path,
        warnings: Sequence[str] = (),
        accepted: AcceptedModel | None = None,
    ) -> None:
        """`warnings` stay out of the text: they do not keep the server from starting. `accepted`: the part
        about the model, when nothing is wrong with it.
        """
        last = f"{config_file}: {counted(len(findings), 'error')}"
        super().__init__("\n".join([*findings, last]), EXIT_CONFIG)
        self.findings = tuple(findings)
        self.warnings = tuple(warnings)
        self.config_file = config_file
        self.accepted = accepted


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shown(value: object) -> str:
    """A value as it stands in the file, on one line, cut when long, safe for any terminal or log."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


class Report:
    """Findings refuse the start; warnings and notes (adjustments, overrides) are handed on to the log."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._sources: dict[str, str] = {}

    def came_from(self, key: str, variable: str) -> None:
        """From now on findings about `key` name the environment variable that supplied its value."""
        self._sources[key] = variable

    def refuse(
        self,
        key: str,
        value: object,
        wrong: str,
        allowed: str,
        see: tuple[str, object] | None = None,
        hint: str = "",
    ) -> None:
        self._add(key, shown(value), wrong, allowed, f"see {see[0]}={shown(see[1])}" if see else hint)

    def refuse_secret(self, key: str, wrong: str, allowed: str) -> None:
        """Like `refuse`, for values that must not get into a log."""
        self._add(key, "<not shown>", wrong, allowed, "")

    def malformed(self, key: str, value: str, wrong: str, allowed: str = "strict JSON") -> None:
        """Like `refuse`, with `value` in the words of the one who found the fault."""
        self._add(key, value, wrong, allowed, "")

    def absent(self, key: str, allowed: str, hint: str = "") -> None:
        self._add(key, "<absent>", "required key is missing", allowed, hint)

    def _add(self, key: str, value: str, wrong: str, allowed: str, hint: str) -> None:
        variable = self._sources.get(key) or self._sources.get(key.partition("[")[0])
        if variable:
            wrong += f" (value from environment variable {variable})"
        self.findings.append(
            f"[config] {key}={value}: {wrong}; allowed: {allowed}" + (f"; {hint}" if hint else "")
        )

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        """Something that was done and is as it should be: for the log at INFO."""
        self.notes.append(text)
