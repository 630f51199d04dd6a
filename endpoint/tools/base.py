"""The seam between a model's way of writing tool calls and the answer made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol


class Kind(Enum):
    TEXT = auto()  # belongs to the answer's content
    CALL = auto()  # a call begins; `text` is the function's name
    ARGUMENTS = auto()  # a piece of the begun call's arguments object, as the model wrote it
    END = auto()  # the begun call is complete: its arguments are one JSON object
    BROKEN = auto()  # the begun call will never be: what follows is content again


class Delta(NamedTuple):
    kind: Kind
    text: str  # to send
    source: str  # what the model wrote for it: joined over all deltas this is the whole text


class CallParser(Protocol):
    """Finds the calls in the text of one choice, as it grows.

    What it returns joined together does not depend on where the text was cut. Work is linear in the text;
    memory is bounded.
    """

    def push(self, text: str, last: bool = False) -> list[Delta]:
        """`last`: nothing follows, so what was held back comes out."""

    @property
    def inside(self) -> bool:
        """Whether the text so far ends within a call, or what may become one; also after the last push."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may be made to call."""

    name: str
    schema: Mapping[str, Any]  # of its arguments, for llguidance's %json


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way of writing calls."""

    markers: tuple[str, ...]  # texts around calls; some tokenizers have them as special tokens
    make_parser: Callable[[], CallParser]
    grammar: Callable[[Sequence[Tool], bool, Mapping[str, int]], str]
    """Of tools, whether several calls are allowed, and the ids of those markers that are special tokens:
    a Lark grammar for llguidance whose every sentence is parsed into calls by the parser. There is one way
    only of writing the text around the arguments, so that no model can lose itself in white space.
    """


def literal(text: str) -> str:
    """A string of llguidance's Lark dialect."""
    return json.dumps(text, ensure_ascii=False)


def marker(text: str, special_ids: Mapping[str, int]) -> str:
    """A marker in Lark. A special token is no text there: it has to be named by its id."""
    return f"<[{special_ids[text]}]>" if text in special_ids else literal(text)


def choice_of_calls(tools: Sequence[Tool], before: Callable[[Tool], str], after: str) -> str:
    """The rule `call`: `before` the arguments of a tool, the arguments, what comes `after` all of them.

    One %json per tool, because `$ref` counts from the root of a schema. llguidance merges them, so that a
    common beginning does not decide for the first tool.
    """
    names = [f"call_{index}" for index in range(len(tools))]
    rules = [
        f"{name}: {before(tool)} %json {json.dumps(tool.schema, ensure_ascii=False)}"
        for name, tool in zip(names, tools, strict=True)
    ]
    return "\n".join([f"call: ({' | '.join(names)}) {after}", *rules])
