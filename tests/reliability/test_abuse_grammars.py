"""A11: schemas, regular expressions and grammars built to explode, in every member that takes one.

What the library refuses, and what takes more than its share, costs a refusal; what is only ugly is followed.
How the limits work is shown in tests/endpoint/test_grammars.py; with the engine in tests/e2e/test_abuse.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.harness import Daemon, Installation, Json, eventually
from tests.reliability.abused import CHAT, MARK, abused, assert_served, refusal


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    with abused(installation) as daemon:
        yield daemon


def chain(length: int, link: Any) -> Json:
    """Definitions that each refer to the next."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def either(number: int) -> Json:
    return {"anyOf": [{"properties": {f"{kind}{number}": {"type": "string"}}} for kind in "ab"]}


REGEXES = {
    "nested quantifiers": "(a+)+$",
    "nested stars": "(a*)*b",
    "counts in counts": "((a{1,99}){1,99}){1,99}",
    "10k alternatives": "|".join(f"w{i}" for i in range(9_999)),
    "empty groups": "()*" * 5000,
    "classes": r"(\p{L}{1,500}){1,20}",
    "a look ahead": f"(?={MARK})a",
    "a reference back": rf"({MARK})\1",
    "the flag x": "(?x) a { 9 9 9 9 9 }",
}
SCHEMAS: dict[str, Json] = {
    "a long chain": chain(700, lambda ref: {"type": "array", "items": ref}),
    "a tree of 2^60 leaves": chain(
        60, lambda ref: {"properties": {"a": ref, "b": ref}, "required": ["a", "b"]}
    ),
    "a circle of choices": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"},
    "2^20 combinations": {"allOf": [either(number) for number in range(20)]},
    "a regex in a schema": {"type": "string", "pattern": "((a{100}){100}){100}"},
    "a long string": {"type": "string", "maxLength": 10**18},
    "a negative length": {"type": "string", "minLength": -1},
    "a range without room": {"type": "number", "minimum": 1e308, "maximum": 1.0000001e308},
    "a tiny step": {"type": "number", "multipleOf": 1e-300},
    "no such type": {"type": MARK},
    "ten thousand cases": {"enum": [f"w{i}" for i in range(9_999)]},
}
MUST_BE_REFUSED = {
    "counts in counts", "a look ahead", "a reference back", "the flag x",
    "a circle of choices", "2^20 combinations", "a regex in a schema", "a long string", "a negative length",
    "a range without room", "a tiny step", "no such type", "ten thousand cases",
}  # fmt: skip


def in_every_member(form: str | Json) -> Iterator[tuple[str, Json]]:
    """(what the error names, members of a request)"""
    if isinstance(form, str):
        yield "guided_regex", {"guided_regex": form}
        yield "structured_outputs.regex", {"structured_outputs": {"regex": form}}
        form = {"type": "string", "pattern": form}
    yield "guided_json", {"guided_json": form}
    yield (
        "response_format",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": form}}},
    )
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": form}}}
    yield "tools", {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


@pytest.mark.slow
@pytest.mark.parametrize("attack", [*REGEXES, *SCHEMAS])
def test_A11_a_grammar_built_to_explode(daemon: Daemon, attack: str) -> None:
    """A good grammar before and after each: neither what it leaves in the sandbox nor its end matters."""
    for field, members in in_every_member(REGEXES.get(attack) or SCHEMAS[attack]):
        answer = CHAT.ask(daemon, max_tokens=2, **members)
        if attack in MUST_BE_REFUSED or answer.status != 200:
            # tools are shown to the model too, and may make the prompt too long
            text = refusal(answer, 422, *([424] if field == "tools" else []))
            assert answer.status == 424 or f"`{field}" in text, (field, text)
            assert len(text) < 400, text
        assert CHAT.ask(daemon, max_tokens=2, guided_regex=f"[ab]{{1,{len(attack)}}}").status == 200
    assert_served(daemon, CHAT)


def test_A11_trials_leave_no_process_behind(daemon: Daemon) -> None:
    assert (
        CHAT.ask(daemon, max_tokens=2, guided_json={"multipleOf": 9999991, "type": "integer"}).status == 422
    )
    endpoint = daemon.child("endpoint")
    eventually(lambda: len(below(endpoint)) <= 1, 10.0, "only the sandbox itself is left")


def below(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)
