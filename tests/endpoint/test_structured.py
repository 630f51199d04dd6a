"""The forms of structured output as the adapters read them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.protocols.openai_completions import OpenAICompletions
from endpoint.protocols.schema_rules import with_closed_objects
from endpoint.protocols.structured import FORMS, VLLM_FORMS, read_grammar
from endpoint.protocols.vllm_generate import VllmGenerate
from endpoint.validation import Fields
from engine.errors import InvalidRequest
from tests.endpoint.samples import model_info

Json = dict[str, Any]
MODEL = model_info()
SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def schema_format(**changes: Any) -> Json:
    described = {"name": "answer", "schema": SCHEMA, **changes}
    return {"type": "json_schema", "json_schema": described}


def with_schema(schema: Json) -> Json:
    return schema_format(schema=schema)


def read(body: Json) -> Any:
    return read_grammar(Fields(body), FORMS)


SCHEMA_PATH = "response_format.json_schema.schema"
LONG = "x" * 70_000
WRONG_FORMATS: list[tuple[Any, str]] = [
    ("json_object", "response_format"),
    ([], "response_format"),
    ({}, "response_format.type"),
    ({"type": None}, "response_format.type"),
    ({"type": 1}, "response_format.type"),
    ({"type": "xml"}, "response_format.type"),
    ({"type": ["text"]}, "response_format.type"),
    ({"type": "json_schema"}, "response_format.json_schema"),
    ({"type": "json_schema", "json_schema": "x"}, "response_format.json_schema"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
    (schema_format(name=""), "response_format.json_schema.name"),
    (schema_format(name=3), "response_format.json_schema.name"),
    (schema_format(name="n" * 65), "response_format.json_schema.name"),
    (schema_format(schema=None), "response_format.json_schema.schema"),
    (schema_format(schema=[]), "response_format.json_schema.schema"),
    (with_schema({"type": "strin"}), "response_format.json_schema.schema.type"),
    (with_schema({"type": ["string", "nul"]}), "response_format.json_schema.schema.type"),
    (with_schema({"type": []}), "response_format.json_schema.schema.type"),
    (with_schema({"type": 3}), "response_format.json_schema.schema.type"),
    (with_schema({"type": [3]}), "response_format.json_schema.schema.type"),
    (with_schema({"properties": []}), "response_format.json_schema.schema.properties"),
    (with_schema({"items": [{}]}), "response_format.json_schema.schema.items"),
    (with_schema({"items": True}), "response_format.json_schema.schema.items"),
    (with_schema({"required": "a"}), "response_format.json_schema.schema.required"),
    (with_schema({"required": [1]}), "response_format.json_schema.schema.required"),
    (with_schema({"properties": {"a": {"type": "x"}}}), f"{SCHEMA_PATH}.properties.a.type"),
    (with_schema({"anyOf": [{"items": 3}]}), "response_format.json_schema.schema.anyOf[0].items"),
    (with_schema({"$defs": {"d": {"not": {"type": "x"}}}}), f"{SCHEMA_PATH}.$defs.d.not.type"),
    (with_schema({"description": LONG}), "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "field"), WRONG_FORMATS)
def test_a_wrong_response_format_is_refused_by_its_field(value: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^`{re.escape(field)}` "):
        read({"response_format": value})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"structured_outputs": "x"}, "structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs.json.type"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": LONG}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex"),
        ({"guided_json": "[" * 20_000}, "guided_json"),
        ({"guided_json": '{"not":' * 900 + "{}" + "}" * 900}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": r'{"type": "\ud800"}'}, "guided_json"),
        ({"guided_json": r'{"properties": {"\ud800": {"type": "bad"}}}'}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_regex": LONG}, "guided_regex"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_grammar": {}}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
    ],
)
def test_a_wrong_form_is_refused_by_its_field(body: Json, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^`{re.escape(field)}` "):
        read(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "disable_any_whitespace": True}},
        {"guided_json": None, "guided_decoding_backend": "x"},
    ],
)
def test_what_asks_for_no_format_gets_none(body: Json) -> None:
    assert read(body) == ("", "")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": schema_format()}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "text"}, "guided_json": SCHEMA}, "guided_json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "structured_outputs.grammar"),
    ],
)
def test_both_openai_endpoints_take_every_form(body: Json, field: str) -> None:
    chat = {"model": MODEL.name, "messages": [{"role": "user", "content": "x"}], **body}
    text = {"model": MODEL.name, "prompt": "x", **body}
    for adapter, whole in ((OpenAIChat(), chat), (OpenAICompletions(), text)):
        request = adapter.parse(whole, MODEL, {})
        assert request.grammar_field == field
        assert request.sampling.grammar == read(body).text
        with pytest.raises(InvalidRequest, match=rf"^`{re.escape(field)}` .*use_beam_search"):
            adapter.parse({**whole, "use_beam_search": True, "n": 2}, MODEL, {})


def test_vllm_generate_takes_its_own_forms_and_ignores_response_format() -> None:
    body = {"prompt": "x", "response_format": 3, "guided_regex": "[ab]"}
    request = VllmGenerate().parse(body, MODEL, {})
    assert request.grammar_field == "guided_regex"
    assert request.sampling.grammar == read_grammar(Fields(body), VLLM_FORMS).text != ""


def closed(**changes: Any) -> Json:
    return {**opened(**changes), "additionalProperties": False}


def opened(**changes: Any) -> Json:
    return {"type": "object", "properties": {"a": {}}, **changes}


OPEN, CLOSED = opened(), closed()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (OPEN, CLOSED),
        ({"type": "object"}, {"type": "object"}),
        (opened(additionalProperties=True), opened(additionalProperties=True)),
        (opened(required=["a"]), closed(required=["a"])),
        (opened(required=["b"]), opened(required=["b"])),
        (opened(minProperties=2), opened(minProperties=2)),
        ({"items": OPEN}, {"items": CLOSED}),
        ({"prefixItems": [OPEN]}, {"prefixItems": [CLOSED]}),
        ({"additionalProperties": OPEN}, {"additionalProperties": CLOSED}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        (opened(anyOf=[OPEN]), opened(anyOf=[OPEN])),
        ({"allOf": [OPEN, OPEN]}, {"allOf": [OPEN, OPEN]}),
        ({"not": OPEN}, {"not": OPEN}),
        ({"if": OPEN, "then": OPEN}, {"if": OPEN, "then": OPEN}),
        ({"enum": [OPEN]}, {"enum": [OPEN]}),
        (opened(properties={"properties": OPEN}), closed(properties={"properties": CLOSED})),
        ({"$ref": "#/$defs/d", "$defs": {"d": OPEN}}, {"$ref": "#/$defs/d", "$defs": {"d": CLOSED}}),
        (
            {"allOf": [{"$ref": "#/$defs/d"}, {"required": ["b"]}], "$defs": {"d": OPEN}},
            {"allOf": [{"$ref": "#/$defs/d"}, {"required": ["b"]}], "$defs": {"d": OPEN}},
        ),
        (
            {"$ref": "#/$defs/d", "required": ["b"], "$defs": {"d": OPEN}},
            {"$ref": "#/$defs/d", "required": ["b"], "$defs": {"d": OPEN}},
        ),
    ],
)  # fmt: skip
def test_objects_are_closed_where_that_contradicts_nothing(given: Json, expected: Json) -> None:
    before = json.dumps(given)
    assert with_closed_objects(given) == expected
    assert json.dumps(given) == before, "the client's schema is left as it is"
