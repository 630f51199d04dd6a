"""What a request body may hold: one declaration per member, from which it is read and documented.

An adapter reads a member by its declaration's `read`, which refuses what is illegal as endpoint.validation
words it; `schema` tells the same in JSON Schema (the dialect of OpenAPI 3.1). So a document made of the
declarations cannot promise what the reading refuses.

Nearly all members are absent from nearly all bodies, so every `read` looks for that first, by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, cast

from endpoint.validation import Fields, Range, objects

Json = dict[str, Any]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration(ABC):
    """One member of a JSON object. `null` means "not sent" unless the member is required.

    `default`: what an absent member means, as a JSON value or, a str, in words.
    """

    name: str = field(kw_only=False)
    meaning: str = field(kw_only=False)  # a sentence for humans
    default: str | int | float | bool | None = None
    required: bool = False
    ignored: bool = False  # accepted whatever it is, and never looked at

    @abstractmethod
    def value_schema(self) -> Json:
        """JSON Schema of a value that is not null."""

    def schema(self) -> Json:
        described: Json = {"description": self.meaning}
        if isinstance(self.default, str):
            described["x-default"] = self.default
        elif self.default is not None:
            described["default"] = self.default
        if self.ignored:
            described["x-ignored"] = True
        value = self.value_schema()
        return {**(value if self.required else _nullable(value)), **described}


@dataclass(frozen=True, slots=True, kw_only=True)
class Integer(Declaration):
    legal: Range = field(kw_only=False)

    def read(self, fields: Fields) -> int | None:
        return None if fields.body.get(self.name) is None else fields.integer(self.name, self.legal)

    def filled(self, fields: Fields) -> int:
        """The value, or `default`, which must be an integer."""
        value = self.read(fields)
        return cast(int, self.default) if value is None else value

    def read_up_to(self, fields: Fields, highest: int) -> int | None:
        """`highest`: a limit of the served model, which `meaning` names in words."""
        if fields.body.get(self.name) is None:
            return None
        return fields.integer(self.name, Range(self.legal.low, highest))

    def value_schema(self) -> Json:
        return {"type": "integer", **range_schema(self.legal)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Declaration):
    legal: Range = field(kw_only=False)

    def read(self, fields: Fields) -> float | None:
        return None if fields.body.get(self.name) is None else fields.number(self.name, self.legal)

    def value_schema(self) -> Json:
        return {"type": "number", **range_schema(self.legal)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Boolean(Declaration):
    """True, false or nothing."""

    def read(self, fields: Fields) -> bool | None:
        return None if fields.body.get(self.name) is None else fields.boolean(self.name)

    def value_schema(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag(Declaration):
    """True or false; `default` when it is not sent."""

    default: bool = False

    def read(self, fields: Fields) -> bool:
        return self.default if fields.body.get(self.name) is None else fields.flag(self.name)

    def value_schema(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Special(Declaration, Generic[P, T]):
    """A member with rules of its own: the function that checks it, and beside it what its schema can tell.

    The schema may be wider than the check, never narrower.
    """

    read: Callable[P, T] = field(kw_only=False)
    json: Json = field(kw_only=False)

    def value_schema(self) -> Json:
        return self.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored(Declaration):
    """Known to other servers, without effect here."""

    meaning: str = "Accepted and ignored."
    ignored: bool = True

    def value_schema(self) -> Json:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Object(Declaration):
    """An object with declared members; others are accepted and ignored."""

    members: tuple[Declaration, ...] = field(kw_only=False)

    def read(self, fields: Fields) -> Fields:
        """The object's own fields; an absent object is an empty one."""
        return fields.object(self.name) or Fields({}, f"{fields.path(self.name)}.")

    def value_schema(self) -> Json:
        schema: Json = {"type": "object", "properties": {m.name: m.schema() for m in self.members}}
        required = [member.name for member in self.members if member.required]
        return {**schema, "required": required} if required else schema

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Declaration]]:
        """Every member at any depth, with the names that lead to it."""
        for member in self.members:
            here = (*path, member.name)
            yield here, member
            if isinstance(member, Object):
                yield from member.walk(here)


@dataclass(frozen=True, slots=True, kw_only=True)
class Single(Object):
    """An array that must hold exactly one object."""

    required: bool = True

    def read(self, fields: Fields) -> Fields:
        value = fields.array(self.name)
        if value is None or len(value) != 1:
            raise fields.error(self.name, "an array of one object", "send one")
        return Fields(objects(value, self.name)[0], f"{fields.path(self.name)}[0].")

    def value_schema(self) -> Json:
        item = Object.value_schema(self)
        return {"type": "array", "items": item, "minItems": 1, "maxItems": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBody(Object):
    """The whole body of a request. `examples`: bodies that work, by a name; a `model` in them is replaced."""

    required: bool = True
    examples: Mapping[str, Json] = field(default_factory=dict)


def request_body(
    meaning: str, *members: Declaration | tuple[Declaration, ...], examples: Mapping[str, Json]
) -> RequestBody:
    """Members that several bodies share come as tuples."""
    flat: list[Declaration] = []
    for member in members:
        flat.extend(member if isinstance(member, tuple) else [member])
    return RequestBody("", meaning, tuple(flat), examples=examples)


def ignored(*names: str) -> tuple[Ignored, ...]:
    return tuple(Ignored(name) for name in names)


def range_schema(legal: Range) -> Json:
    schema: Json = {"exclusiveMinimum" if legal.low_open else "minimum": legal.low}
    if legal.high != math.inf:
        schema["exclusiveMaximum" if legal.high_open else "maximum"] = legal.high
    return schema


def _nullable(schema: Json) -> Json:
    """The schema of the same value, or null."""
    if not schema:
        return schema
    if schema.keys() == {"anyOf"}:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "type" not in schema or schema.keys() & {"enum", "const", "anyOf"}:
        return {"anyOf": [schema, {"type": "null"}]}
    kinds = schema["type"]
    return {**schema, "type": [*(kinds if isinstance(kinds, list) else [kinds]), "null"]}
