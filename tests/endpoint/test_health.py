"""What the health routes say in every condition of the service, and which states may follow which."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from endpoint.health import _NEXT, Command, Condition, Health, State
from engine.errors import EngineBug, WrongState

Step = Callable[[Health], None]


def serving(instances: int = 2) -> Health:
    health = Health()
    health.expect(range(instances))
    for number in range(instances):
        health.instance_up(number)
    health.opened()
    return health


def lose(*numbers: int, final: bool = False) -> Health:
    health = serving()
    for number in numbers:
        health.instance_down(number, "was killed by SIGKILL", final=final)
    return health


def full() -> Health:
    health = serving()
    health.is_saturated = lambda: True
    return health


def ended(end: Step) -> Health:
    health = serving()
    end(health)
    return health


LOADING = Health()
LOADING.expect([0])
LOADING.loading(0, "weights", 0.4)

# name, service, condition, statuses of live, ready and /health; what the message of live says
ROWS = [
    ("just started", Health(), Condition.LOADING, (200, 503, 503), "loading"),
    ("loading", LOADING, Condition.LOADING, (200, 503, 503), "weights 40 %"),
    ("serving", serving(), Condition.WELL, (200, 200, 200), ""),
    ("full", full(), Condition.BUSY, (200, 503, 200), "alive but busy"),
    ("one of two left", lose(1), Condition.DEGRADED, (200, 200, 200), "instance 1 is restarting"),
    ("one of two given up", lose(1, final=True), Condition.DEGRADED, (200, 200, 200), "instance 1 is lost"),
    ("all given up", lose(0, 1, final=True), Condition.GIVEN_UP, (500, 500, 500), "SIGKILL"),
    ("none left", lose(0, 1), Condition.HEALING, (200, 503, 503), "was killed by SIGKILL"),
    ("stopping", ended(Health.stopping), Condition.STOPPING, (503, 503, 503), "stopping"),
    ("given up", ended(lambda h: h.giving_up("5 deaths")), Condition.GIVEN_UP, (500, 500, 500), "5 deaths"),
]


@pytest.mark.parametrize(
    ("health", "condition", "statuses", "says"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_every_condition_has_its_statuses(
    health: Health, condition: Condition, statuses: tuple[int, int, int], says: str
) -> None:
    assert health.condition is condition
    live, ready = health.live(), health.ready()
    assert (live.status, ready.status, health.healthy()) == statuses
    assert says in live.message and bool(live.message) == bool(says)
    assert bool(ready.message) == (ready.status != 200)  # who can take requests has an empty body


def test_an_instance_that_comes_back_makes_the_service_whole() -> None:
    health = lose(0, 1)
    assert health.state is State.ABNORMAL and health.degraded == "2 of 2 instances"
    health.loading(0, "weights", 0.5)
    assert health.live().message.endswith("weights 50 %), instance 1 is restarting (was killed by SIGKILL)")
    health.instance_up(0)
    assert (health.state, health.condition) == (State.NORMAL, Condition.DEGRADED)
    health.instance_up(1)
    assert health.condition is Condition.WELL and health.live() == (200, "")


def test_an_instance_that_serves_is_not_yet_a_service() -> None:
    health = Health()
    health.expect([0, 1])
    health.instance_up(0)
    assert health.condition is Condition.LOADING and health.ready().status == 503
    health.opened()
    assert health.condition is Condition.DEGRADED


def test_a_stop_is_no_failure_whatever_dies_by_it() -> None:
    health = serving(1)
    health.stopping()
    health.instance_down(0, "the service is stopping", final=True)
    assert health.ready() == (503, "the service is stopping")


def test_the_end_is_final() -> None:
    health = serving()
    health.stopping()
    health.instance_down(0, "killed")
    health.stopping()
    assert health.live() == (503, "the service is stopping")
    health.giving_up("5 deaths within 60 s")
    for _ in range(2):
        health.stopping()
        health.instance_up(0)
        health.giving_up("another reason")
        assert health.live() == health.ready() == (500, "5 deaths within 60 s")
        assert health.state is State.ABNORMAL


def test_the_numbers_are_those_of_running_status() -> None:
    assert {state.name: int(state) for state in State} == {
        "READY": 0, "NORMAL": 1, "ABNORMAL": 2, "PAUSE": 3, "INIT": 4, "BUSY": 5,
    }  # fmt: skip


def test_no_state_follows_but_those_of_the_table() -> None:
    for before, after in itertools.product(State, State):
        health = Health()
        health._state = before
        if after is before or after in _NEXT[before]:
            health._move(after)
            assert health._state is after
        else:
            with pytest.raises(EngineBug, match=f"{before.name} -> {after.name}"):
                health._move(after)


# -- the checker's findings and commands -------------------------------------------------------------


def test_what_the_checker_finds_is_told() -> None:
    health = serving()
    health.checked(State.BUSY, "no token within 5 s; devices 90 % busy")
    assert health.live() == (200, "alive but busy: no token within 5 s; devices 90 % busy")
    assert health.ready().status == 503 and health.healthy() == 200
    health.checked(State.ABNORMAL, "no token within 5 s; devices 0 % busy")
    assert health.condition is Condition.ABNORMAL
    assert health.live() == health.ready() == (500, "no token within 5 s; devices 0 % busy")
    assert health.healthy() == 500
    health.checked(State.NORMAL)
    assert health.live() == (200, "")


def test_an_abnormal_service_whose_last_instance_is_replaced_is_healing() -> None:
    health = serving(1)
    health.checked(State.ABNORMAL, "no token")
    health.instance_down(0, "its step took too long")
    assert health.condition is Condition.HEALING and health.live().status == 200
    health.checked(State.NORMAL)  # asked before the death
    assert health.condition is Condition.HEALING
    health.instance_up(0)
    assert health.condition is Condition.WELL


def test_a_pause_outlasts_checks_and_healing_and_ends_by_start() -> None:
    health = serving(1)
    assert health.command(Command.PAUSE) and health.is_paused() and health.state is State.PAUSE
    assert (health.live().status, health.ready().status, health.healthy()) == (200, 503, 503)
    health.checked(State.ABNORMAL, "no token")
    health.instance_down(0, "killed")
    assert health.condition is Condition.HEALING
    health.instance_up(0)
    assert health.state is State.PAUSE and "paused" in health.ready().message
    assert health.command(Command.REINIT) and health.state is State.READY and health.is_paused()
    assert health.command(Command.START) and health.live() == (200, "")


def test_a_start_that_fails_is_abnormal() -> None:
    health = serving(1)
    health.command(Command.PAUSE_ROCE)
    health.instance_down(0, "killed")
    assert not health.command(Command.START)
    assert health.state is State.ABNORMAL and health.condition is Condition.HEALING
    assert health.serving == {0: False}


@pytest.mark.parametrize(
    ("command", "before", "now"),
    [
        (Command.PAUSE, None, "INIT"),
        (Command.START, None, "INIT"),
        (Command.REINIT, [], "NORMAL"),
        (Command.START, [], "NORMAL"),
        (Command.PAUSE, [Command.PAUSE], "PAUSE"),
        (Command.REINIT, [Command.PAUSE, Command.REINIT], "READY"),
    ],
)
def test_a_command_is_refused_in_the_wrong_state(
    command: Command, before: list[Command] | None, now: str
) -> None:
    health = Health() if before is None else serving()
    for each in before or ():
        health.command(each)
    with pytest.raises(WrongState, match=f"`cmd` {command.value} .* while the state is {now}"):
        health.command(command)


def test_no_command_is_taken_by_a_service_that_stops() -> None:
    health = serving()
    health.stopping()
    with pytest.raises(WrongState, match="while the state is stopping"):
        health.command(Command.PAUSE)
