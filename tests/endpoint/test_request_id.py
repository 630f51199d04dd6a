"""Which header is a name for a request."""

from __future__ import annotations

import pytest

from endpoint.request_id import internal_id, new_uuid


@pytest.mark.parametrize("name", ["a", "A-1_b.c:d", "x" * 128, "7"])
def test_legal_names_are_taken(name: str) -> None:
    assert internal_id({"req-id": name}, "ours") == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a/b", "a\n", "é", "a\x00", "{}", "a,b", "a%20"])
def test_others_are_replaced(name: str) -> None:
    assert internal_id({"req-id": name}, "ours") == "ours"
    assert internal_id({}, "ours") == "ours"


def test_ours_are_legal_and_never_the_same() -> None:
    ours = {new_uuid() for _ in range(1000)}
    assert len(ours) == 1000 and all(internal_id({"req-id": name}, "") == name for name in ours)
