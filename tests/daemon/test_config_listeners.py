"""The table of planes and listeners, row by row."""

from __future__ import annotations

import itertools

import pytest

from daemon.listeners import merge_planes

A, B = "127.0.0.1", "127.0.0.2"
BUSINESS, MANAGEMENT, METRICS = "business", "management", "metrics"


@pytest.mark.parametrize(
    ("addresses", "ports", "expected"),
    [
        pytest.param((A, A), (1, 1, 1), [((BUSINESS, MANAGEMENT, METRICS), A, 1)], id="same: b=m=x"),
        pytest.param(
            (A, A), (1, 1, 3), [((BUSINESS, MANAGEMENT), A, 1), ((METRICS,), A, 3)], id="same: b=m, x differs"
        ),
        pytest.param(
            (A, A), (1, 2, 2), [((BUSINESS,), A, 1), ((MANAGEMENT, METRICS), A, 2)], id="same: b differs, m=x"
        ),
        pytest.param(
            (A, B),
            (1, 2, 2),
            [((BUSINESS,), A, 1), ((MANAGEMENT, METRICS), B, 2)],
            id="other: b differs, m=x",
        ),
        pytest.param(
            (A, A),
            (1, 2, 3),
            [((BUSINESS,), A, 1), ((MANAGEMENT,), A, 2), ((METRICS,), A, 3)],
            id="same: all differ",
        ),
        pytest.param(
            (A, B),
            (1, 2, 3),
            [((BUSINESS,), A, 1), ((MANAGEMENT,), B, 2), ((METRICS,), B, 3)],
            id="other: all differ",
        ),
        pytest.param(
            (A, B),
            (1, 1, 3),
            [((BUSINESS,), A, 1), ((MANAGEMENT,), B, 1), ((METRICS,), B, 3)],
            id="other: b=m",
        ),
        pytest.param(
            (A, B),
            (1, 2, 1),
            [((BUSINESS,), A, 1), ((MANAGEMENT,), B, 2), ((METRICS,), B, 1)],
            id="other: b=x",
        ),
        pytest.param(
            (A, B), (1, 1, 1), [((BUSINESS,), A, 1), ((MANAGEMENT, METRICS), B, 1)], id="other: b=m=x"
        ),
        pytest.param((A, A), (1, 2, 1), None, id="same: b=x, m differs"),
    ],
)
def test_row(
    addresses: tuple[str, str], ports: tuple[int, int, int], expected: list[tuple[object, ...]] | None
) -> None:
    bindings = merge_planes(*addresses, *ports)
    assert (None if bindings is None else [tuple(binding) for binding in bindings]) == expected


def test_every_layout_serves_each_plane_once_and_binds_nothing_twice() -> None:
    for management, ports in itertools.product((A, B), itertools.product((1, 2, 3), repeat=3)):
        bindings = merge_planes(A, management, *ports)
        if bindings is None:
            continue
        served = [plane for binding in bindings for plane in binding.planes]
        assert sorted(served) == [BUSINESS, MANAGEMENT, METRICS]
        places = [(binding.address, binding.port) for binding in bindings]
        assert len(set(places)) == len(places)
