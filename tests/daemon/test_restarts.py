"""When a dead child is replaced, and when not."""

from __future__ import annotations

from daemon.restarts import MOST_DEATHS, WINDOW_S, RestartPolicy


def test_pauses_double_and_the_fifth_death_in_a_minute_is_the_last() -> None:
    policy = RestartPolicy()
    assert [policy.note_death("worker", float(second)) for second in range(5)] == [0.0, 0.5, 1.0, 2.0, None]
    assert policy.verdict == "5 deaths within 60 s"


def test_deaths_far_apart_are_replaced_at_once_and_for_ever() -> None:
    policy = RestartPolicy()
    for number in range(5 * MOST_DEATHS):
        assert policy.note_death("worker", number * WINDOW_S) == 0.0
        policy.note_ready("worker")


def test_replacements_that_never_get_ready_are_given_up_however_long_they_take() -> None:
    policy = RestartPolicy()
    policy.note_ready("worker 0")
    policy.note_ready("worker 1")
    for number in range(1 + MOST_DEATHS):
        now = number * WINDOW_S * 2
        delay = policy.note_death("worker 0", now)
        assert (delay is None) == (number == MOST_DEATHS)
        assert policy.note_death("worker 1", now + WINDOW_S) == 0.0  # the other one does get ready
        policy.note_ready("worker 1")
    assert policy.verdict == "5 replacements in a row died before they were ready"
