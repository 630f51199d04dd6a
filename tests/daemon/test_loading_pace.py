"""Lines about loading: rate and time left, as soon as there is something to count with."""

from __future__ import annotations

from daemon.loading_pace import LoadingPace
from engine.wire.messages import Progress

MIB = 2**20


def weights(fraction: float) -> Progress:
    return Progress(0, "weights", fraction, 1000 * MIB)


def test_rate_and_time_left_are_of_what_has_been_seen() -> None:
    pace = LoadingPace()
    assert pace.line(weights(0.1), 100.0) == "weights 10 %"
    assert pace.line(weights(0.2), 100.5) == "weights 20 %", "too early to tell"
    assert pace.line(weights(0.5), 104.0) == "weights 50 %, 100 MiB/s, 5 s left"
    assert pace.line(weights(1.0), 109.0) == "weights 100 %, 100 MiB/s"


def test_every_phase_begins_anew_and_may_have_nothing_to_count() -> None:
    pace = LoadingPace()
    pace.line(weights(0.5), 0.0)
    assert pace.line(Progress(0, "warm-up", 0.25, 0), 50.0) == "warm-up 25 %"
    assert pace.line(Progress(0, "warm-up", 0.75, 0), 54.0) == "warm-up 75 %, 2 s left"


def test_a_report_that_repeats_itself_says_no_rate() -> None:
    pace = LoadingPace()
    pace.line(weights(0.5), 0.0)
    assert pace.line(weights(0.5), 30.0) == "weights 50 %"
