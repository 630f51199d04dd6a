"""What validation has to say, collected until everything has been looked at."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import EXIT_CONFIG, StartupError

_SHOWN_CHARS = 120


class ConfigError(StartupError):
    """config.json cannot be used. The text is one line per finding, then the file and their number."""

    def __init__(self, findings: list[str], config_file: Path) -> None:
        count = len(findings)
        last = f"{config_file}: {count} error{'' if count == 1 else 's'}"
        super().__init__("\n".join([*findings, last]), EXIT_CONFIG)
        self.findings = tuple(findings)


def shown(value: object) -> str:
    """A value as it stands in the file, on one line, cut when long, safe for any terminal or log."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


class Report:
    """Findings refuse the start, warnings are handed on to the log."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.warnings: list[str] = []
        self._sources: dict[str, str] = {}

    def came_from(self, key: str, variable: str) -> None:
        """From now on findings about `key` name the environment variable that supplied its value."""
        self._sources[key] = variable

    def refuse(
        self, key: str, value: object, wrong: str, allowed: str, see: tuple[str, object] | None = None
    ) -> None:
        self._add(key, shown(value), wrong, allowed, see)

    def malformed(self, key: str, value: str, wrong: str) -> None:
        """Like `refuse`, with `value` in the words of the one who found the fault."""
        self._add(key, value, wrong, "strict JSON", None)

    def absent(self, key: str, allowed: str) -> None:
        self._add(key, "<absent>", "required key is missing", allowed, None)

    def _add(self, key: str, value: str, wrong: str, allowed: str, see: tuple[str, object] | None) -> None:
        variable = self._sources.get(key) or self._sources.get(key.partition("[")[0])
        if variable:
            wrong += f" (value from environment variable {variable})"
        line = f"[config] {key}={value}: {wrong}; allowed: {allowed}"
        if see is not None:
            line += f"; see {see[0]}={shown(see[1])}"
        self.findings.append(line)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
