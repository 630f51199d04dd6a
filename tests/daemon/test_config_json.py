"""Strict JSON."""

from __future__ import annotations

import pytest

from daemon.config_json import FILE_DEPTH, parse_json


def test_depth_limit_is_exact() -> None:
    for depth in (FILE_DEPTH - 1, FILE_DEPTH, FILE_DEPTH + 1):
        _, faults = parse_json("[" * depth + "1" + "]" * depth, FILE_DEPTH)
        assert bool(faults) == (depth > FILE_DEPTH), depth


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000])
def test_absurd_depth_is_a_fault_not_a_crash(text: str) -> None:
    assert parse_json(text, FILE_DEPTH)[1]


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": [1e999]}', "1" * 5000])
def test_unrepresentable_numbers(text: str) -> None:
    assert parse_json(text, FILE_DEPTH)[1]


def test_every_repeated_key_is_named_with_its_path() -> None:
    _, faults = parse_json('{"a": [{"b": 1, "b": 2}], "c": 1, "c": 2, "d": 1}', FILE_DEPTH)
    assert {(fault.path, fault.value) for fault in faults} == {("a[0].b", "2"), ("c", "2")}


def test_a_fault_shows_its_value_and_no_deep_ones() -> None:
    _, faults = parse_json('{"a": NaN, "b": [[1]], "c": 1, "c": {"d": 1}}', 2)
    assert [(fault.path, fault.value) for fault in faults] == [
        ("c", "{...}"),
        ("a", "NaN"),
        ("b[0]", "[...]"),
    ]


def test_names_cannot_break_a_line() -> None:
    _, faults = parse_json('{"x\\ny": NaN}', FILE_DEPTH)
    assert faults[0][0] == '"x\\ny"'


def test_good_json_has_no_faults() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "x"]}', FILE_DEPTH) == (
        {"a": [1, 2.5, None, True, "x"]},
        [],
    )
