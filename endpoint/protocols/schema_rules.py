"""JSON Schemas of clients: what is refused before anything is compiled, and what is understood of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from endpoint.validation import Fields

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = (
    "items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "contains", "propertyNames",
    "not", "if", "then", "else",
)  # fmt: skip
_SHOWN_NAME = 40  # characters of a property's name in an error text

# keywords whose schemas must all hold together with what stands beside them
_MEETING = ("allOf", "not", "if", "then", "else", "dependentSchemas")
_CHOICES = ("anyOf", "oneOf")
_OF_OBJECTS = frozenset(
    ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties",
     "propertyNames", "$ref", "$dynamicRef", *_MEETING)
)  # fmt: skip
_OPENS = frozenset(
    ("additionalProperties", "unevaluatedProperties", "$ref", "$dynamicRef", *_MEETING, *_CHOICES)
)
_ANNOTATIONS = frozenset(
    ("$ref", "title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions",
     "$schema", "$id")
)  # fmt: skip


def check_schema(schema: Fields) -> None:
    """Refuse what is no schema by its form, at any depth. Raises InvalidRequest."""
    kinds = schema.raw("type")
    listed = kinds if isinstance(kinds, list) else [kinds]
    if kinds is not None and not (listed and all(_is_text(kind) and kind in _TYPES for kind in listed)):
        raise schema.error("type", f"one of {', '.join(_TYPES)}, or a list of them")
    required = schema.raw("required")
    if required is not None and not (isinstance(required, list) and all(map(_is_text, required))):
        raise schema.error("required", "a list of strings")
    schema.object("items")
    for child in _children(schema):
        check_schema(child)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _children(schema: Fields) -> Iterator[Fields]:
    for name in _MAPS:
        members = schema.object(name)
        if members is not None:
            for key, value in members.body.items():
                if isinstance(value, Mapping):
                    yield Fields(value, f"{members.path(key[:_SHOWN_NAME])}.")
    for name in _LISTS:
        for index, value in enumerate(schema.array(name) or []):
            if isinstance(value, Mapping):
                yield Fields(value, f"{schema.path(name)}[{index}].")
    for name in _SINGLE:
        value = schema.raw(name)
        if isinstance(value, Mapping):
            yield Fields(value, f"{schema.path(name)}.")


def with_closed_objects(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in which `additionalProperties` is false wherever it is not given.

    Only for objects that declare `properties`, and only where that contradicts nothing: parts that must hold
    together with others (`allOf`, `not`, `if`, a `$ref` or `anyOf` beside other keywords) stay as they are,
    because a closed part would forbid what the other one demands, and so does an object that requires
    properties it does not declare. The definitions stay as they are once one of them is used in such a place.
    """
    result: dict[str, Any] = _closed(schema, definitions=not _refers_in_company(schema, False))
    return result


def _closed(schema: Any, definitions: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    maps = ("properties", "patternProperties", *(("$defs", "definitions") if definitions else ()))
    for name in maps:
        if isinstance(schema.get(name), Mapping):
            result[name] = {key: _closed(value, definitions) for key, value in schema[name].items()}
    for name in ("items", "additionalProperties"):
        if name in schema:
            result[name] = _closed(schema[name], definitions)
    lists = ("prefixItems", *(() if schema.keys() & _OF_OBJECTS else _CHOICES))
    for name in lists:
        if isinstance(schema.get(name), list):
            result[name] = [_closed(value, definitions) for value in schema[name]]
    if _may_be_closed(schema):
        result["additionalProperties"] = False
    return result


def _may_be_closed(schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or schema.keys() & _OPENS:
        return False
    least = schema.get("minProperties", 0)
    enough = not isinstance(least, int | float) or least <= len(properties)
    return enough and set(schema.get("required") or ()) <= properties.keys()


def _refers_in_company(value: Any, met: bool) -> bool:
    """Whether a `$ref` stands where its target must hold together with something else."""
    if isinstance(value, list):
        return any(_refers_in_company(item, met) for item in value)
    if not isinstance(value, Mapping):
        return False
    if "$ref" in value and (met or value.keys() - _ANNOTATIONS):
        return True
    company = bool(value.keys() & _OF_OBJECTS)
    return any(
        _refers_in_company(child, met or name in _MEETING or (name in _CHOICES and company))
        for name, child in value.items()
    )
