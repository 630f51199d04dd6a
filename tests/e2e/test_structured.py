"""Structured output over HTTP: whatever the model would like to say, the answer has the format asked for."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.harness import Daemon, Json

SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
FORMAT: Json = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
CHAT: Json = {
    "model": "mindie-tiny",
    "messages": [{"role": "user", "content": "Who are you?"}],
    "max_tokens": 100,
}
TEXT: Json = {"model": "mindie-tiny", "prompt": "Once upon a time", "max_tokens": 60}


def conforms(text: str) -> None:
    jsonschema.validate(json.loads(text), {**SCHEMA, "additionalProperties": False})


def frames(body: bytes) -> list[Any]:
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_an_answer_conforms_to_its_schema(server: Daemon, temperature: float) -> None:
    answer = server.post(
        "/v1/chat/completions", {**CHAT, "response_format": FORMAT, "temperature": temperature}
    )
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    conforms(choice["message"]["content"])


def test_a_stream_conforms_to_its_schema(server: Daemon) -> None:
    answer = server.post(
        "/v1/chat/completions",
        {**CHAT, "response_format": FORMAT, "stream": True, "seed": 1, "temperature": 1},
    )
    choices = [frame["choices"][0] for frame in frames(answer.body)]
    assert choices[-1]["finish_reason"] == "stop"
    conforms("".join(choice["delta"].get("content") or "" for choice in choices))


def test_every_choice_conforms_to_its_schema(server: Daemon) -> None:
    body = {**TEXT, "response_format": FORMAT, "n": 3, "temperature": 2, "max_tokens": 100}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 3
    for choice in choices:
        conforms(choice["text"])


def test_a_json_object_is_asked_for(server: Daemon) -> None:
    body = {
        **TEXT,
        "response_format": {"type": "json_object"},
        "temperature": 1.5,
        "max_tokens": 100,
        "seed": 3,
    }
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"structured_outputs": {"regex": "^(yes|no)!$"}}, "(yes|no)!"),
        ({"guided_choice": ["red", "green", "blue"]}, "red|green|blue"),
        ({"structured_outputs": {"choice": ['a "b"', "c\\d"]}}, r'a "b"|c\\d'),
        ({"guided_grammar": 'start: "<" word ">"\nword: /[a-z]{2,5}/'}, "<[a-z]{2,5}>"),
        ({"structured_outputs": {"grammar": 'root ::= "(" [0-9] [0-9] ")"'}}, r"\([0-9]{2}\)"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
    ],
)
def test_vllm_forms_are_followed(server: Daemon, form: Json, pattern: str) -> None:
    completion = server.post("/v1/completions", {**TEXT, **form, "temperature": 2}).json()["choices"][0]
    assert re.fullmatch(pattern, completion["text"]) and completion["finish_reason"] == "stop"
    generated = server.post("/generate", {"prompt": "x", "max_tokens": 60, **form}).json()["text"][0]
    assert re.fullmatch(f"x ?(?:{pattern})", generated)


def test_a_hostile_form_costs_one_refusal(server: Daemon) -> None:
    for form in (
        {"guided_regex": "(((x{100}){100}){100}){100}"},
        {"guided_json": {"type": "integer", "multipleOf": 9_999_991}},
        {"guided_json": {"$ref": "#"}},
    ):
        answer = server.post("/v1/completions", {**TEXT, **form})
        assert answer.status == 422 and "cannot be followed" in answer.json()["error"]
        good = server.post("/v1/completions", {**TEXT, "guided_regex": "ok"})
        assert good.json()["choices"][0]["text"] == "ok"


def test_a_stop_string_ends_a_structured_answer_too(server: Daemon) -> None:
    body = {**TEXT, "guided_regex": "(ab){5}END(cd){5}", "stop": "END"}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab" * 5, "stop")


def test_a_length_ends_within_legal_json(server: Daemon) -> None:
    choice = server.post("/v1/completions", {**TEXT, "response_format": FORMAT, "max_tokens": 5}).json()[
        "choices"
    ][0]
    assert choice["finish_reason"] == "length" and choice["text"].startswith("{")


def test_the_process_that_computes_masks_may_die(server: Daemon) -> None:
    """In mid-answer, by somebody else's hand: nobody notices, and nothing is left of it at the end."""
    body = {**TEXT, "response_format": {"type": "json_object"}, "seed": 5, "temperature": 1, "logprobs": 0}
    body |= {"max_tokens": 300, "ignore_eos": True, "stream": True}

    def streamed(kill: bool) -> list[str]:
        texts = []
        with server.streaming("/v1/completions", body) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
                    if kill and len(texts) in (5, 50):
                        (keeper,) = server.child("worker").children()
                        (keeper if len(texts) == 5 else keeper.children()[0]).kill()
        return texts

    whole = streamed(kill=False)
    assert len(whole) > 60 and streamed(kill=True) == whole
    assert streamed(kill=False) == whole
    assert server.stderr.count("the process that computes masks") == 2
    helpers = server.child("worker").children(recursive=True)
    assert [helper.name()[:15] for helper in helpers] == ["mindieservice_d"] * 2
