"""What the parsers of all formats do alike: look for openers, read a call's head, stream its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

from endpoint.tools.base import Delta, Kind
from endpoint.tools.json_scan import SPACES, JsonScanner

MAX_HEAD = 65_536  # characters before the arguments; more of them are content


class Found(NamedTuple):
    """A call's head has been read."""

    name: str
    arguments: str | None  # all of them, when they came before the name; None: they begin now


Head = Generator[None, str, Found | None]
"""Is sent character after character. Ends with what it found, or with None when this is no call. The
character it ends on is read again by others, unless the arguments were part of the head.
"""
Tail = Generator[None, str, bool]
"""As Head, for what must follow the arguments; ends with whether it did, the last character included."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """Where calls can begin and end in one format.

    No character but the first of a literal may be one with which a literal begins, other than in a literal
    of one repeated character; that is why a mismatch never has to be read twice.
    """

    at_start: tuple[str, ...]  # literals that open a call where only white space has come before
    in_text: tuple[str, ...]  # ... anywhere
    after_call: tuple[str, ...]  # ... after a call
    closers: tuple[str, ...]  # literals that may follow a call, and then are part of it
    head: Callable[[str], Head]  # for the opener: what follows it up to the arguments
    tail: Callable[[], Tail] | None  # what must follow the arguments


class _Place(NamedTuple):
    openers: tuple[str, ...]
    literals: tuple[str, ...]
    first: re.Pattern[str]  # a character with which a literal begins


def _place(openers: tuple[str, ...], closers: tuple[str, ...] = ()) -> _Place:
    literals = openers + closers
    return _Place(
        openers, literals, re.compile("[" + re.escape("".join({text[0] for text in literals})) + "]")
    )


class SyntaxParser:
    """A CallParser for a Syntax.

    The rule for text that breaks off: until a call's head is certain, up to and with the bracket that opens
    its arguments, nothing of it is sent, and what turns out to be no head becomes content to the character.
    From then on arguments are sent for as long as they are JSON, and cannot be taken back: at the first
    character that is not, the call is broken, and that character and all after it are content again. A call
    is complete when its arguments are and what the format wants after them has come. White space between a
    call and its neighbours is nobody's. Arguments that come before the name are held back with the head.
    """

    def __init__(self, syntax: Syntax) -> None:
        self._syntax = syntax
        self._start = _place(syntax.at_start)
        self._text = _place(syntax.in_text)
        self._after = _place(syntax.after_call, syntax.closers)
        self._place = self._start
        self._held: list[str] = []  # not decided yet
        self._literal = ""  # what of a literal has been read
        self._head: Head | None = None
        self._scanner: JsonScanner | None = None
        self._tail: Tail | None = None
        self._deltas: list[Delta] = []
        self._inside = False

    @property
    def inside(self) -> bool:
        return self._inside

    def push(self, text: str, last: bool = False) -> list[Delta]:
        self._deltas = []
        position = 0
        while position < len(text):
            if self._scanner is not None:
                position = self._scan(self._scanner, text, position)
            elif self._head is not None:
                position += self._step_head(self._head, text[position])
            elif self._tail is not None:
                position += self._step_tail(self._tail, text[position])
            else:
                position = self._search(text, position)
        self._inside = self._head is not None or self._scanner is not None
        if last:
            self._finish()
        return self._deltas

    # -- outside of calls -----------------------------------------------------------------------------

    def _search(self, text: str, position: int) -> int:
        place, char = self._place, text[position]
        if self._literal:
            return position + self._step_literal(char)
        if place is not self._text and (run := SPACES.match(text, position)):
            self._send(Kind.TEXT, run[0] if place is self._start else "", run[0])
            return run.end()
        if place.first.match(text, position):
            for literal in place.literals:
                if text.startswith(literal, position):
                    self._read(literal)
                    return position + len(literal)
            return position + self._step_literal(char)
        self._place = self._text
        found = self._text.first.search(text, position)
        end = len(text) if found is None else found.start()
        self._send_text(text[position:end])
        return end

    def _step_literal(self, char: str) -> int:
        """Characters read: none when `char` does not go on with a literal."""
        read = self._literal + char
        if read in self._place.literals:
            self._literal = ""
            self._read(read)
            return 1
        if any(literal.startswith(read) for literal in self._place.literals):
            self._literal = read
            return 1
        self._send_text(self._literal)
        self._literal, self._place = "", self._text
        return 0

    def _read(self, literal: str) -> None:
        if literal in self._place.openers:
            self._held = [literal]
            self._head = self._syntax.head(literal)
            next(self._head)
        else:
            self._send(Kind.TEXT, "", literal)

    # -- calls ----------------------------------------------------------------------------------------

    def _step_head(self, head: Head, char: str) -> int:
        try:
            if len(self._held) >= MAX_HEAD:
                head.close()
                return self._no_head()
            head.send(char)
        except StopIteration as end:
            found: Found | None = end.value
            if found is None:
                return self._no_head()
            self._head = None
            if found.arguments is None:
                self._begin(found.name)
                self._scanner = JsonScanner()
                return 0
            self._held.append(char)
            self._begin(found.name)
            self._send(Kind.ARGUMENTS, found.arguments, "")
            self._end()
            return 1
        self._held.append(char)
        return 1

    def _no_head(self) -> int:
        self._head = None
        self._send_text(self._take_held())
        self._place = self._text
        return 0

    def _begin(self, name: str) -> None:
        self._send(Kind.CALL, name, self._take_held())

    def _scan(self, scanner: JsonScanner, text: str, position: int) -> int:
        end = scanner.feed(text, position)
        if end > position:
            self._send(Kind.ARGUMENTS, text[position:end], text[position:end])
        if scanner.failed:
            self._break()
        elif scanner.complete:
            self._scanner = None
            if self._syntax.tail is None:
                self._end()
            else:
                self._tail = self._syntax.tail()
                next(self._tail)
        return end

    def _step_tail(self, tail: Tail, char: str) -> int:
        try:
            tail.send(char)
        except StopIteration as end:
            self._tail = None
            if end.value:
                self._held.append(char)
                self._end()
                return 1
            self._break()
            return 0
        self._held.append(char)
        return 1

    def _end(self) -> None:
        self._send(Kind.END, "", self._take_held())
        self._place = self._after

    def _break(self) -> None:
        self._scanner = self._tail = None
        self._send(Kind.BROKEN, "", "")
        self._send_text(self._take_held())
        self._place = self._text

    def _finish(self) -> None:
        if self._head is not None:
            self._no_head()
        elif self._scanner is not None:
            self._break()
        elif self._tail is not None:  # what is missing says nothing that the arguments do not
            self._tail = None
            self._end()
        self._send_text(self._literal)
        self._literal = ""

    def _take_held(self) -> str:
        held = "".join(self._held)
        self._held = []
        return held

    def _send_text(self, text: str) -> None:
        if text:
            self._send(Kind.TEXT, text, text)

    def _send(self, kind: Kind, text: str, source: str) -> None:
        self._deltas.append(Delta(kind, text, source))
