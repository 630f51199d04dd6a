"""Reads one JSON value in pieces, to tell how far a text is JSON and where it ends."""

from __future__ import annotations

import re
from enum import Enum, auto

SPACE = " \t\n\r"
MAX_DEPTH = 100
SPACES = re.compile(r"[ \t\n\r]+")
_CHARACTERS = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPED = frozenset('"\\/bfnrt')
_DIGITS = frozenset("0123456789")


class _At(Enum):
    VALUE = auto()
    FIRST_KEY = auto()  # or the end of an empty object
    KEY = auto()
    COLON = auto()
    FIRST_ITEM = auto()  # or the end of an empty array
    AFTER = auto()  # a value inside a container has ended
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    WORD = auto()
    END = auto()
    FAILED = auto()


# States of a number: what has been read last, and what each character leads to.
_NUMBER: dict[str, dict[str, str]] = {
    "-": {"0": "zero", "1-9": "whole"},
    "zero": {".": ".", "e": "e"},
    "whole": {"0": "whole", "1-9": "whole", ".": ".", "e": "e"},
    ".": {"0": "fraction", "1-9": "fraction"},
    "fraction": {"0": "fraction", "1-9": "fraction", "e": "e"},
    "e": {"0": "exponent", "1-9": "exponent", "+-": "sign"},
    "sign": {"0": "exponent", "1-9": "exponent"},
    "exponent": {"0": "exponent", "1-9": "exponent"},
}
_COMPLETE_NUMBERS = frozenset({"zero", "whole", "fraction", "exponent"})
_NUMBER_CLASS = {
    **dict.fromkeys("123456789", "1-9"),
    "0": "0",
    ".": ".",
    "e": "e",
    "E": "e",
    "+": "+-",
    "-": "+-",
}
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}


class JsonScanner:
    """One object or array, strictly as RFC 8259 has it. Linear; keeps one character per open bracket."""

    def __init__(self) -> None:
        self._at = _At.VALUE
        self._open: list[str] = []
        self._rest = ""  # of `true`, `false` or `null`
        self._number = ""
        self._digits = 0  # of \uXXXX still to come
        self._in_key = False

    @property
    def complete(self) -> bool:
        return self._at is _At.END

    @property
    def failed(self) -> bool:
        return self._at is _At.FAILED

    def feed(self, text: str, start: int) -> int:
        """Read from `start`; returns where it stopped: at the text's end, past the value, or at a fault."""
        position = start
        while position < len(text) and self._at not in (_At.END, _At.FAILED):
            position = self._step(text, position)
        return position

    def _step(self, text: str, position: int) -> int:
        char = text[position]
        match self._at:
            case _At.STRING:
                run = _CHARACTERS.match(text, position)
                return run.end() if run else self._string_character(char, position)
            case _At.ESCAPE:
                self._digits = 4
                follows = _At.HEX if char == "u" else _At.STRING if char in _ESCAPED else _At.FAILED
                return self._to(follows, position)
            case _At.HEX:
                self._digits -= 1
                follows = _At.STRING if self._digits == 0 else _At.HEX
                return self._to(follows if char in _HEX else _At.FAILED, position)
            case _At.NUMBER:
                return self._number_character(char, position)
            case _At.WORD:
                matches, self._rest = char == self._rest[0], self._rest[1:]
                if not matches:
                    return self._to(_At.FAILED, position)
                return self._to(_At.WORD if self._rest else _At.AFTER, position)
        if char in SPACE:
            run = SPACES.match(text, position)
            return run.end() if run else position + 1
        return self._structure(char, position)

    def _to(self, at: _At, position: int) -> int:
        """The character at `position` leads to `at`. One that is at fault is not read."""
        self._at = at
        return position if at is _At.FAILED else position + 1

    def _string_character(self, char: str, position: int) -> int:
        if char == "\\":
            return self._to(_At.ESCAPE, position)
        if char != '"':
            return self._to(_At.FAILED, position)
        return self._to(_At.COLON if self._in_key else _At.AFTER, position)

    def _number_character(self, char: str, position: int) -> int:
        follows = _NUMBER[self._number].get(_NUMBER_CLASS.get(char, ""))
        if follows is not None:
            self._number = follows
            return position + 1
        if self._number not in _COMPLETE_NUMBERS:
            return self._to(_At.FAILED, position)
        self._at = _At.AFTER
        return position  # it is read again

    def _structure(self, char: str, position: int) -> int:
        match self._at, char:
            case ((_At.FIRST_KEY | _At.KEY), '"'):
                self._in_key = True
                return self._to(_At.STRING, position)
            case _At.COLON, ":":
                return self._to(_At.VALUE, position)
            case ((_At.FIRST_KEY | _At.AFTER), "}") if self._open[-1] == "{":
                return self._close(position)
            case ((_At.FIRST_ITEM | _At.AFTER), "]") if self._open[-1] == "[":
                return self._close(position)
            case _At.AFTER, ",":
                return self._to(_At.KEY if self._open[-1] == "{" else _At.VALUE, position)
            case ((_At.VALUE | _At.FIRST_ITEM), _):
                return self._to(self._begin(char), position)
        return self._to(_At.FAILED, position)

    def _begin(self, char: str) -> _At:
        """What the first character of a value leads to."""
        if char in "{[":
            if len(self._open) == MAX_DEPTH:
                return _At.FAILED
            self._open.append(char)
            return _At.FIRST_KEY if char == "{" else _At.FIRST_ITEM
        if not self._open:
            return _At.FAILED
        if char == '"':
            self._in_key = False
            return _At.STRING
        if char in _WORDS:
            self._rest = _WORDS[char]
            return _At.WORD
        if char in _DIGITS or char == "-":
            self._number = "-" if char == "-" else "zero" if char == "0" else "whole"
            return _At.NUMBER
        return _At.FAILED

    def _close(self, position: int) -> int:
        self._open.pop()
        return self._to(_At.AFTER if self._open else _At.END, position)
