"""A JSON file of a checkpoint, read key by key; whatever a key holds instead of what it should is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EXIT_INIT, StartupError

MAX_INT = 2**31 - 1  # token ids and positions are int32
_SHOWN = 60  # characters of a wrong value
_ORDINARY = (1e-12, 1e12)  # no model needs a number beyond, and there the formulas made of them overflow
_ORDINARY_TEXT = " (0 or of a size in [1e-12, 1e12])"


class ConfigValues:
    """Typed access to one JSON object.

    null means absent but where a getter says otherwise. Every refusal is a StartupError of one line: the
    file, the key, what is legal, and the value found.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix`: the keys that lead to this object inside of the file, each with a dot."""
        self.file = file
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> ConfigValues:
        """StartupError names the file when it is missing or holds no JSON object."""
        try:
            values = json.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise StartupError(f"cannot read {file}: {error.strerror}", EXIT_INIT) from None
        except (ValueError, RecursionError) as error:
            raise StartupError(f"{file} is not valid JSON: {error}", EXIT_INIT) from None
        if not isinstance(values, dict):
            raise StartupError(f"{file} must hold a JSON object", EXIT_INIT)
        return cls(file, values)

    def refusal(self, reason: str) -> StartupError:
        return StartupError(f"{self.file}: {reason}", EXIT_INIT)

    def wrong(self, key: str, legal: str) -> StartupError:
        """The refusal of what `key` holds."""
        return self.refusal(f"{self._prefix}{key} must be {legal}, found {shown(self.raw(key))}")

    def raw(self, key: str) -> Any:
        """The value, unchecked; None when absent."""
        return self._values.get(key)

    def positive(self, key: str, *, most: int = MAX_INT) -> int:
        """A whole number in [1, most]; required."""
        value = self.raw(key)
        if not _is_int(value) or not 1 <= value <= most:
            raise self.wrong(key, f"an integer in [1, {most}]")
        return int(value)

    def optional_positive(self, key: str) -> int | None:
        """None when absent or null."""
        return None if self.raw(key) is None else self.positive(key)

    def whole(self, key: str) -> int:
        """A whole number >= 0; 0 when absent or null."""
        return 0 if self.raw(key) in (None, 0) and self.raw(key) is not False else self.positive(key)

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers >= 0; empty when absent or null."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(_is_int(item) and 0 <= item <= MAX_INT for item in value):
            raise self.wrong(key, "a list of whole numbers >= 0")
        return value

    def number(self, key: str, default: float, *, least: float) -> float:
        """A number >= least; null is refused."""
        if key not in self._values:
            return default
        value = self.raw(key)
        if not _is_number(value) or value < least:
            raise self.wrong(key, f"a number >= {least:g}{_ORDINARY_TEXT}")
        return float(value)

    def optional_number(self, key: str, *, least: float) -> float | None:
        """None when absent or null."""
        return None if self.raw(key) is None else self.number(key, 0.0, least=least)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty when absent."""
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return value

    def section(self, key: str) -> ConfigValues:
        """A nested object; empty when absent."""
        value = self.raw(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return ConfigValues(self.file, value, f"{self._prefix}{key}.")

    def names(self) -> list[str]:
        return list(self._values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    smallest, largest = _ORDINARY
    return (_is_int(value) or isinstance(value, float)) and (value == 0 or smallest <= abs(value) <= largest)


def shown(value: object) -> str:
    """The value as its file has it, cut to a length fit for one line."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
