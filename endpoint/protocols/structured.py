"""The format an answer must follow, as `response_format` and vLLM's structured forms ask for it.

Nothing is compiled here: the forms become grammar text for llguidance, which endpoint.grammars tries out.

JSON comes on one line, with a blank after `,` and `:` or without, as every model can write it. More would be
legal JSON, but small models never leave blanks once they may write them, and indentation costs tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from endpoint.declarations import Json, Special
from endpoint.json_body import MIN_DEPTH_LIMIT, parse_body
from endpoint.protocols.schema_rules import check_schema, with_closed_objects
from endpoint.validation import Fields, is_larger
from engine.errors import InvalidRequest
from engine.grammar_limits import MAX_GRAMMAR_BYTES

_MAX_NAME = 64
_SCHEMA_WANTED = f"a JSON Schema: an object, or the JSON text of one, at most {MIN_DEPTH_LIMIT} levels deep"
_GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)


class Grammar(NamedTuple):
    """What an answer must follow; both empty when it may be anything."""

    text: str  # SamplingParams.grammar
    field: str  # the field that asks for it, as the client wrote it


ANYTHING = Grammar("", "")


def read_grammar(fields: Fields, forms: Sequence[_Form]) -> Grammar:
    """The one format a body asks for; `forms`: the fields of the dialect that may.

    Raises InvalidRequest for a form that is wrong in itself, too long, or one of several.
    """
    asked = [form.read(fields) for form in forms if fields.body.get(form.name) is not None]
    found = [grammar for grammar in asked if grammar.text]
    if len(found) > 1:
        raise InvalidRequest(
            f"`{found[0].field}` and `{found[1].field}` both give the format of the answer, but one request "
            "has one format; leave one of them out"
        )
    return found[0] if found else ANYTHING


def _check_size(fields: Fields, name: str) -> None:
    value = fields.raw(name)
    # the first look ends early: to write all of it down would take as long as a big body is big
    if (
        is_larger(value, MAX_GRAMMAR_BYTES)
        or len(json.dumps(value, ensure_ascii=False).encode()) > MAX_GRAMMAR_BYTES
    ):
        raise InvalidRequest(
            f"`{fields.path(name)}` must have at most {MAX_GRAMMAR_BYTES} bytes as JSON; shorten it"
        )


def _response_format(fields: Fields, name: str) -> Grammar:
    wanted = fields.object(name)
    assert wanted is not None
    kind = wanted.raw("type")
    if kind == "text":
        return ANYTHING
    if kind == "json_object":
        schema = wanted.object("value")  # where huggingface_hub puts the schema it was given
        return Grammar(_of_schema(schema), wanted.path("value")) if schema else Grammar(_ANY_OBJECT, name)
    if kind != "json_schema":
        raise wanted.error("type", '"text", "json_object" or "json_schema"')
    described = wanted.object("json_schema")
    if described is None:
        raise wanted.error("json_schema", "an object with `name` and `schema`")
    title = described.text("name")
    if title is None or len(title) > _MAX_NAME:
        raise described.error("name", f"a string of 1 to {_MAX_NAME} characters")
    schema = described.object("schema")
    if schema is None:
        raise described.error("schema", "an object")
    return Grammar(_of_schema(schema), described.path("schema"))


def _structured_outputs(fields: Fields, name: str) -> Grammar:
    """vLLM's object of one form; its other members choose between libraries or are hints."""
    asked = fields.object(name)
    assert asked is not None
    if asked.raw("structural_tag") is not None:
        raise asked.unsupported("structural_tag")
    return read_grammar(asked, _INNER)


def _json(fields: Fields, name: str) -> Grammar:
    """A schema, or the JSON text of one."""
    value = fields.raw(name)
    if isinstance(value, str):
        try:
            value = parse_body(value.encode(), MIN_DEPTH_LIMIT)  # it may be as hostile as a body
        except InvalidRequest:
            raise fields.error(name, _SCHEMA_WANTED) from None
    if not isinstance(value, Mapping):
        raise fields.error(name, _SCHEMA_WANTED)
    return Grammar(_of_schema(Fields(value, f"{fields.path(name)}.")), fields.path(name))


def _json_object(fields: Fields, name: str) -> Grammar:
    return Grammar(_ANY_OBJECT, fields.path(name)) if fields.flag(name) else ANYTHING


def _regex(fields: Fields, name: str) -> Grammar:
    """A regular expression, which the whole answer matches: anchors at its ends say nothing new."""
    pattern = fields.text(name)
    assert pattern is not None
    return Grammar(_lark(f"start: /{_in_slashes(_without_anchors(pattern))}/"), fields.path(name))


def _choice(fields: Fields, name: str) -> Grammar:
    options = fields.array(name)
    if not options or not all(isinstance(option, str) and option for option in options):
        raise fields.error(name, "a non-empty array of non-empty strings")
    literals = " | ".join(json.dumps(option, ensure_ascii=False) for option in dict.fromkeys(options))
    # a terminal, not a rule: it becomes one automaton, whatever the number of options
    return Grammar(_lark(f"start: CHOICE\nCHOICE: {literals}"), fields.path(name))


def _grammar(fields: Fields, name: str) -> Grammar:
    """Lark as llguidance has it, or the GBNF of llama.cpp, which endpoint.grammars translates."""
    text = fields.text(name)
    assert text is not None
    if _GBNF_RULE.search(text):
        return Grammar(json.dumps({"gbnf": text}), fields.path(name))
    return Grammar(_lark(text), fields.path(name))


def _of_schema(schema: Fields) -> str:
    check_schema(schema)
    closed = with_closed_objects(schema.body)
    return json.dumps({"grammars": [{"json_schema": {**closed, "x-guidance": _JSON_OPTIONS}}]})


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _without_anchors(pattern: str) -> str:
    pattern = pattern.removeprefix("^")
    backslashes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\")) if pattern.endswith("$") else 1
    return pattern if backslashes % 2 else pattern[:-1]


def _in_slashes(pattern: str) -> str:
    """The pattern as it stands between two slashes on one line of a Lark grammar."""
    pieces = re.findall(r"\\.|.", pattern, re.DOTALL)
    return "".join(_SLASHED.get(piece, piece) for piece in pieces)


_SLASHED = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}  # as regex
_ANY_OBJECT = _of_schema(Fields({"type": "object"}))


# -- the fields -----------------------------------------------------------------------------------------

_Form = Special[[Fields], Grammar]


def _form(
    name: str, meaning: str, read: Callable[[Fields, str], Grammar], schema: Json, *, outer: bool = True
) -> _Form:
    """`read` is given the field's name, and is not asked where the field is not there."""

    def read_if_given(fields: Fields) -> Grammar:
        if fields.raw(name) is None:
            return ANYTHING
        if outer:
            _check_size(fields, name)
        return read(fields, name)

    return Special(name, meaning, read_if_given, schema)


_SCHEMA: Json = {"type": ["object", "string"]}
_TEXT: Json = {"type": "string", "minLength": 1}
_OPTIONS: Json = {"type": "array", "minItems": 1, "items": _TEXT}
_FLAG: Json = {"type": "boolean"}
_NAMED: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": _MAX_NAME},
        "schema": {"type": "object"},
    },
    "required": ["name", "schema"],
}
_JSON_MEANING = "A JSON Schema, or its text: the answer is JSON that conforms to it."
_REGEX_MEANING = (
    "A regular expression that the whole answer matches; without look-around and back-references."
)
_CHOICE_MEANING = "The answer is one of these texts."
_GRAMMAR_MEANING = "A grammar the answer follows: Lark as llguidance has it, or GBNF."

_INNER = (
    _form("json", _JSON_MEANING, _json, _SCHEMA, outer=False),
    _form("regex", _REGEX_MEANING, _regex, _TEXT, outer=False),
    _form("choice", _CHOICE_MEANING, _choice, _OPTIONS, outer=False),
    _form("grammar", _GRAMMAR_MEANING, _grammar, _TEXT, outer=False),
    _form("json_object", "true: the answer is a JSON object.", _json_object, _FLAG, outer=False),
)

RESPONSE_FORMAT = _form(
    "response_format",
    "The format of the answer: any text, a JSON object, or JSON that conforms to a schema.",
    _response_format,
    {
        "anyOf": [
            {
                "type": "object",
                "properties": {"type": {"enum": ["text", "json_object"]}, "value": {"type": "object"}},
                "required": ["type"],
            },
            {
                "type": "object",
                "properties": {"type": {"const": "json_schema"}, "json_schema": _NAMED},
                "required": ["type", "json_schema"],
            },
        ],
    },
)
VLLM_FORMS = (
    _form(
        "structured_outputs",
        "The format of the answer, in one form of several.",
        _structured_outputs,
        {"type": "object", "properties": {form.name: form.schema() for form in _INNER}},
    ),
    _form("guided_json", _JSON_MEANING, _json, _SCHEMA),
    _form("guided_regex", _REGEX_MEANING, _regex, _TEXT),
    _form("guided_choice", _CHOICE_MEANING, _choice, _OPTIONS),
    _form("guided_grammar", _GRAMMAR_MEANING, _grammar, _TEXT),
)
FORMS = (RESPONSE_FORMAT, *VLLM_FORMS)
