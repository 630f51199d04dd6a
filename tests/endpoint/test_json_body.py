"""A03, A04: hostile bodies are refused quickly, honest ones parsed as JSON says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint import json_body
from endpoint.json_body import MAX_NODES, parse_body
from engine.errors import InvalidRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(body=st.dictionaries(st.text(), JSON), ascii_only=st.booleans())
def test_every_json_object_comes_back(body: dict[str, Any], ascii_only: bool) -> None:
    try:
        raw = json.dumps(body, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    assert parse_body(raw, 10) == body


def test_a_byte_order_mark_is_tolerated() -> None:
    assert parse_body(b'\xef\xbb\xbf{"a": 1}', 10) == {"a": 1}


def test_escaped_pairs_and_nul_are_characters() -> None:
    assert parse_body(rb'{"a": "\ud83d\ude00\u0000"}', 10) == {"a": "\U0001f600\0"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"[]",
        b'"text"',
        b"1",
        b"null",
        b"{",
        b'{"a": 1,}',
        b"{'a': 1}",
        b'{"a": 1} x',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        b'{"a": ' + b"9" * 5000 + b"}",
        rb'{"a": "\ud800"}',
        rb'{"\udfff": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\x00"}',
        '{"a": 1}'.encode("utf-16"),
        b"\x1f\x8b\x08\x00",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_body(raw, 64)


def nested(depth: int) -> bytes:
    """An object whose deepest value is at `depth`."""
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(("configured", "effective"), [(10, 64), (64, 64), (100, 100)])
def test_the_depth_limit_is_the_configured_one_but_at_least_64(configured: int, effective: int) -> None:
    parse_body(nested(effective), configured)
    with pytest.raises(InvalidRequest, match=f"deeper than {effective}"):
        parse_body(nested(effective + 1), configured)


def test_brackets_and_commas_inside_strings_do_not_count() -> None:
    text = '[{,"\\' * 2000
    assert parse_body(json.dumps({"a": text, "b": [text]}).encode(), 64) == {"a": text, "b": [text]}


def test_many_siblings_are_not_deep() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "["}]}] * 500}
    assert parse_body(json.dumps(body).encode(), 64) == body


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"a": "' + b'\\"' * 1_000_000 + b"[" * 1_000_000,
        b'"' * 1_000_000 + b"[" * 1000,
        b"\\" * 1_000_000 + b"[" * 1000,
    ],
    ids=["arrays", "objects", "open string", "quotes", "backslashes"],
)
def test_A03_deep_or_broken_megabytes_never_reach_the_recursive_parser(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parser(*args: Any, **kwargs: Any) -> Any:
        assert raw.count(b"[") <= 64 or args[0].count('"') > 2, "the parser saw a deep body"
        raise ValueError("stopped")

    monkeypatch.setattr("json.loads", parser)
    with pytest.raises(InvalidRequest):
        parse_body(raw, 64)


def test_A03_the_number_of_values_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_NODES == 1_000_000
    monkeypatch.setattr(json_body, "MAX_NODES", 1000)
    parse_body(b'{"a": [' + b"1," * 990 + b"1]}", 64)
    parse_body(b'{"a": "' + b"," * 5000 + b'"}', 64)
    for raw in (
        b'{"a": [' + b"1," * 1000 + b"1]}",
        b'{"a": [' + b"[]," * 1000 + b"1]}",
        b'"' * 9000 + b"," * 1000,
    ):
        with pytest.raises(InvalidRequest, match="more than 1000 JSON values"):
            parse_body(raw, 64)


@pytest.mark.parametrize(
    "raw", [b'{"secret": }', b'{"secret": 1, "secret": 2}', b'["secret"]', b'{"secret": "\xff"}']
)
def test_the_refusal_repeats_nothing_of_the_body(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(raw, 64)
    assert "secret" not in str(caught.value)
