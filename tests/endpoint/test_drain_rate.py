"""Retry-After from the measured rate, by a clock of the test's own."""

from __future__ import annotations

from endpoint.drain_rate import DrainRate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def busy(rate: DrainRate, clock: Clock, *, seconds: float, per_second: float, waiting: float = 10) -> None:
    """`per_second` leave a line that others join, so that `waiting` stand in it all the time."""
    for _ in range(round(seconds * per_second)):
        clock.now += 1 / per_second
        rate.advance(waiting, drained=1)


def test_it_is_the_time_the_line_takes_at_the_measured_rate() -> None:
    for per_second in (0.5, 2.0, 100.0):
        clock = Clock()
        rate = DrainRate(clock)
        busy(rate, clock, seconds=100, per_second=per_second)
        expected = 20 / per_second
        assert 0.9 * expected <= rate.retry_after_s(20) <= 1.1 * expected + 1


def test_newer_times_count_more() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    busy(rate, clock, seconds=100, per_second=100.0)
    fast = rate.retry_after_s(100)
    busy(rate, clock, seconds=200, per_second=2.0)
    assert fast <= 2 and 45 <= rate.retry_after_s(100) <= 51


def test_time_without_a_line_says_nothing_of_the_rate() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    busy(rate, clock, seconds=100, per_second=4.0)
    before = rate.retry_after_s(20)
    clock.now += 100_000
    rate.advance(0)
    assert rate.retry_after_s(20) == before == 5


def test_as_long_as_nothing_drains_the_wait_grows() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    found = []
    for seconds in (0.0, 2.5, 5.0, 1000.0):
        clock.now += seconds
        found.append(rate.retry_after_s(3))
    assert found[0] == 1 and 2 <= found[1] < found[2] <= 8 and found[3] == 60


def test_it_is_between_one_second_and_sixty() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    busy(rate, clock, seconds=10, per_second=10.0)
    assert (rate.retry_after_s(1), rate.retry_after_s(1e9)) == (1, 60)
    clock.now += 1e6  # a line that has stood still for days
    assert rate.retry_after_s(1) == 60
