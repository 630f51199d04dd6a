"""Tool calls in a model's text: found in every format, at every cut, and nothing of the text is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoint.tools import json_scan, machine
from endpoint.tools.base import Kind
from endpoint.tools.json_scan import MAX_DEPTH, JsonScanner
from endpoint.tools.registry import FORMATS, detect
from tests.endpoint.call_texts import BROKEN, WELL_FORMED, deepseek, read

EVERY_FORMAT = sorted({form for form, *_ in WELL_FORMED})
TEXTS = pytest.mark.parametrize(("form", "text", "content", "calls"), WELL_FORMED + BROKEN)


@TEXTS
def test_what_a_text_is_made_of(form: str, text: str, content: str, calls: list[list[Any]]) -> None:
    found = read(form, text)
    assert (found.content, found.calls, found.source) == (content, calls, text)
    for _, arguments, complete in found.calls:
        if complete:
            assert isinstance(json.loads(arguments), dict)


@TEXTS
def test_it_does_not_matter_where_the_text_is_cut(
    form: str, text: str, content: str, calls: list[list[Any]]
) -> None:
    whole = read(form, text)
    assert read(form, *text, "") == whole
    for cut in range(len(text) + 1):
        assert read(form, text[:cut], text[cut:]) == whole


@pytest.mark.parametrize(("form", "text", "content", "calls"), WELL_FORMED)
def test_arguments_are_sent_as_they_are_written(
    form: str, text: str, content: str, calls: list[list[Any]]
) -> None:
    """Unless they come before the name, nothing of them is held back."""
    parser = FORMATS[form].make_parser()
    begun = written = sent = 0
    for char in text:
        for delta in parser.push(char):
            begun += delta.kind is Kind.CALL
            sent += len(delta.text) * (delta.kind is Kind.ARGUMENTS)
            written += len(delta.source) * (delta.kind is Kind.ARGUMENTS)
    assert begun == len(calls)
    early = sum(len(arguments) for _, arguments, _ in calls) - ('"arguments": {"x": 1}, "name"' in text) * 8
    assert written == early <= sent


PIECES = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', "{", "}",
    "[", "]", '"', "\\", "\\u12", ":", ",", ";", " ", "\n", "<", "<|python_tag|>", "```", "```json\n",
    "function", "name", "f", "0", "-1.5e+3", "01", "true", "nul", "é", "\u0000", "x" * 70,
    *(deepseek(f"<{words}>") for words in ("calls begin", "calls end", "call begin", "call end", "sep")),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EVERY_FORMAT), st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40))
def test_nothing_of_any_text_is_lost_and_calls_are_json(form: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    found = read(form, text)
    assert found.source == text
    assert read(form, *pieces, "") == found
    for name, arguments, complete in found.calls:
        assert name and complete is not None
        if complete:
            assert isinstance(json.loads(arguments), dict)
    if not found.calls:
        assert found.content == text


def hostile(size: int) -> list[str]:
    head = '<tool_call>{"name": "f", "arguments": '
    return [
        "<tool_call>" * size,
        "<tool_call>{" * size,
        "<" * size,
        " " * size,
        "`" * size,
        deepseek("<calls begin>") * size,
        deepseek("<calls begin><call begin>") * size,
        head * size,
        head + "[" * size,
        head + '{"a":' * size,
        head + '{"' + "x" * size,
        head + '{"' + "\\" * size,
        head + '{"a": ' + "9" * size,
        head + '{"a": ' + " " * size,
        '<tool_call>{"arguments": {"a": "' + "<tool_call>" * size,
        '<tool_call>{"name": "' + "f" * size,
        "<tool_call>" + " " * size,
        "{" * size,
        '{"name": "f", "parameters": {}}' + "; " * size,
    ]


class Counted:
    """Counts the steps of everything that reads characters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        for owner, name in [
            (machine.SyntaxParser, "_search"),
            (machine.SyntaxParser, "_step_literal"),
            (machine.SyntaxParser, "_step_head"),
            (machine.SyntaxParser, "_step_tail"),
            (json_scan.JsonScanner, "_step"),
        ]:
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.steps += 1
            return method(*arguments)

        return call


@pytest.mark.parametrize("form", EVERY_FORMAT)
def test_A33_hostile_texts_cost_a_few_steps_per_character(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A33."""
    counted = Counted(monkeypatch)
    for text in hostile(1_000):
        for pieces in [(text,), (*text, "")]:
            counted.steps = 0
            found = read(form, *pieces)
            assert counted.steps <= 4 * len(text) + 10, text[:60]
            assert found.source == text


@pytest.mark.parametrize("form", EVERY_FORMAT)
def test_A33_what_is_held_back_is_bounded(form: str) -> None:
    for text in hostile(machine.MAX_HEAD * 2):
        parser = FORMATS[form].make_parser()
        sent = sum(len(delta.source) for delta in parser.push(text[: machine.MAX_HEAD * 2]))
        assert sent >= machine.MAX_HEAD // 2


def test_A33_a_hundred_thousand_openers_are_text() -> None:
    text = "<tool_call>" * 100_000
    deltas = FORMATS["hermes"].make_parser().push(text, last=True)
    assert "".join(delta.text for delta in deltas) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=4), st.booleans(), st.sampled_from([None, 1]), st.text())
def test_the_scanner_takes_all_of_an_object_and_no_more(
    value: dict[str, Any], ascii_only: bool, indent: int | None, rest: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    scanner = JsonScanner()
    assert scanner.feed(text + rest, 0) == len(text) and scanner.complete


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.sampled_from(list('{}[]:,"0123.eE+-tfn')), max_size=12))
def test_the_scanner_takes_what_json_takes(pieces: list[str]) -> None:
    text = "{" + "".join(pieces)
    scanner = JsonScanner()
    end = scanner.feed(text, 0)
    prefix = text[:end]
    if scanner.complete:
        assert isinstance(json.loads(prefix), dict)
    else:
        for cut in range(1, len(text) + 1):
            with pytest.raises(ValueError, match=r".*"):
                json.loads(text[:cut])


def test_the_scanner_stops_at_a_depth() -> None:
    scanner = JsonScanner()
    assert scanner.feed('{"a":' + "[" * MAX_DEPTH, 0) == 5 + MAX_DEPTH - 1 and scanner.failed


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", "hermes"),
        ("... <tool_call> ... </tool_call>", "hermes"),
        ("<|start_header_id|>{{ x }}<|python_tag|>", "llama3"),
        (deepseek("<calls begin>") + "\\n```json\\n", "deepseek_v3"),
        (deepseek("<calls begin>"), "deepseek_v31"),
    ],
)
def test_the_template_tells_the_format(template: str, form: str) -> None:
    assert detect(template) == form
