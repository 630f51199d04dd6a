"""The heads of calls that are a JSON object with a name and arguments."""

from __future__ import annotations

import json
from collections.abc import Container, Generator

from endpoint.tools.json_scan import SPACE, JsonScanner
from endpoint.tools.machine import Found, Head, Tail
from endpoint.validation import is_function_name

_MAX_STRING = 400  # characters of a name, every one of its 64 letters perhaps escaped


def call_object(argument_names: Container[str], opener: str) -> Head:
    """`{"name": ..., "arguments": {...}}`, the members in any order. Its `{` may have been the opener.

    Of other members only `type` and `id` with plain strings are put up with.
    """
    name = arguments = None
    if opener != "{" and (yield from after_space()) != "{":
        return None
    while True:
        if (yield from after_space()) != '"':
            return None
        key = yield from _short_string()
        if key is None or (yield from after_space()) != ":":
            return None
        char = yield from after_space()
        if key in argument_names and arguments is None and char == "{":
            if name is not None:
                return Found(name, None)
            arguments = yield from _object()
            if arguments is None:
                return None
        elif key in ("name", "type", "id") and char == '"':
            value = yield from _short_string()
            if value is None or (key == "name" and (name is not None or not is_function_name(value))):
                return None
            name = value if key == "name" else name
        else:
            return None
        char = yield from after_space()
        if char == "}":
            return None if name is None or arguments is None else Found(name, arguments)
        if char != ",":
            return None


def closing_brace() -> Tail:
    return (yield from after_space()) == "}"


def after_space() -> Generator[None, str, str]:
    """The next character that is no white space."""
    while True:
        char = yield
        if char not in SPACE:
            return char


def _short_string() -> Generator[None, str, str | None]:
    """A string of the characters that names have, its opening quote already read."""
    read: list[str] = []
    while (char := (yield)) != '"':
        if len(read) == _MAX_STRING or not (char.isalnum() or char in "_-\\"):
            return None
        read.append(char)
    try:
        text: str = json.loads(f'"{"".join(read)}"')
    except ValueError:
        return None
    return text


def _object() -> Generator[None, str, str | None]:
    """An object, its opening bracket already read."""
    scanner = JsonScanner()
    scanner.feed("{", 0)
    read = ["{"]
    while not scanner.complete:
        char = yield
        scanner.feed(char, 0)
        if scanner.failed:
            return None
        read.append(char)
    return "".join(read)
