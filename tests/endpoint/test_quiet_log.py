"""Floods of events in the log: one line at once, one per interval, with numbers."""

from __future__ import annotations

import logging

import pytest

from endpoint.quiet_log import QuietLog

log = logging.getLogger("server.test")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_the_first_is_told_at_once_and_the_others_with_the_next(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    quiet = QuietLog(log)
    for _ in range(4):
        quiet.warning("full", "no room")
    quiet.warning("other", "another kind")
    clock[0] += 10
    quiet.warning("full", "no room")
    clock[0] += 10
    quiet.warning("full", "no room")
    assert caplog.messages == [
        "no room",
        "another kind",
        "no room (4 since the last such line)",
        "no room",
    ]


def test_events_are_told_apart_by_their_labels_most_frequent_first(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    quiet = QuietLog(log)
    quiet.warning("key", "no key", "10.0.0.1")
    for number in range(7):
        for _ in range(number + 1):
            quiet.warning("key", "no key", f"10.0.0.{number}")
    clock[0] += 10
    quiet.warning("key", "no key", "10.0.0.6")
    first, second = caplog.messages
    assert first == "no key (10.0.0.1: 1)"
    assert second.startswith("no key (29 since the last such line; 10.0.0.6: 8, 10.0.0.5: 6, ")
    assert second.endswith(", and 2 others)")


def test_labels_without_end_are_not_remembered_without_end(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    quiet = QuietLog(log)
    for number in range(5000):
        quiet.warning("key", "no key", f"peer {number}")
    clock[0] += 10
    quiet.warning("key", "no key", "peer 4999")
    assert "5000 since the last such line; others: 4000, " in caplog.messages[1]
    assert caplog.messages[1].endswith("and 996 others)")
