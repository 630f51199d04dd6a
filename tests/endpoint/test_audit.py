"""What of a client's own text gets into the audit log."""

from __future__ import annotations

import pytest

from endpoint.audit import plain


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v2/models/a%2fb/infer", "/v2/models/a%2fb/infer"),
        ("/x] [success", "/x%5D%20%5Bsuccess"),
        ("/\x1b[2J\n[root]", "/%1B%5B2J%0A%5Broot%5D"),
        ("/\u202eevil", "/%E2%80%AEevil"),
        ("/\udcff", "/%FF"),
        ("/" + "a" * 99, "/" + "a" * 99),
        ("/" + "a" * 8000, "/" + "a" * 99 + "...(8001 characters)"),
        ("/" + "\u20ac" * 99, "/" + "%E2%82%AC" * 11 + "...(100 characters)"),
    ],
)
def test_paths_are_short_and_plain(path: str, told: str) -> None:
    assert plain(path, 100) == told
