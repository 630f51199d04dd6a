"""How the service is, as a state machine, and what each health route says about it.

States are MindIE's (the numbers of running-status). What they lack, the fate of single instances and the end
of the service, stands beside them; `Health.condition` folds all of it into the one row that is answered from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from engine.errors import EngineBug, WrongState

log = logging.getLogger("server.health")


class State(IntEnum):
    """Of the engine as a whole; the numbers are those of running-status."""

    READY = 0  # re-initialised after a pause, not started yet
    NORMAL = 1
    ABNORMAL = 2
    PAUSE = 3
    INIT = 4
    BUSY = 5


_NEXT: dict[State, set[State]] = {
    State.INIT: {State.NORMAL, State.BUSY},
    State.NORMAL: {State.BUSY, State.PAUSE, State.ABNORMAL},
    State.BUSY: {State.NORMAL, State.PAUSE, State.ABNORMAL},
    State.ABNORMAL: {State.NORMAL, State.BUSY, State.PAUSE},
    State.PAUSE: {State.READY, State.NORMAL, State.ABNORMAL},  # -> ABNORMAL: a command failed
    State.READY: {State.NORMAL, State.BUSY, State.ABNORMAL},
}


class Command(IntEnum):
    """Of fault-handling-command."""

    PAUSE = 0
    REINIT = 1
    START = 2
    PAUSE_ROCE = 3


# command: the states it is legal in, and the one it leads to
_COMMANDS: dict[Command, tuple[frozenset[State], State]] = {
    Command.PAUSE: (frozenset({State.NORMAL, State.BUSY, State.ABNORMAL}), State.PAUSE),
    Command.PAUSE_ROCE: (frozenset({State.NORMAL, State.BUSY, State.ABNORMAL}), State.PAUSE),
    Command.REINIT: (frozenset({State.PAUSE}), State.READY),
    Command.START: (frozenset({State.PAUSE, State.READY}), State.NORMAL),
}


class Ending(Enum):
    """Whether the service is on its way out; it never comes back from there."""

    NOT = "not"
    STOPPING = "stopping"
    GIVEN_UP = "given up"


_NEXT_ENDING: dict[Ending, set[Ending]] = {
    Ending.NOT: {Ending.STOPPING, Ending.GIVEN_UP},
    Ending.STOPPING: {Ending.GIVEN_UP},
    Ending.GIVEN_UP: set(),
}


class Condition(Enum):
    """Everything a health route tells apart, most pressing first."""

    GIVEN_UP = "given up"
    STOPPING = "stopping"
    LOADING = "loading"
    HEALING = "no instance can serve, but one is coming back"
    ABNORMAL = "abnormal"
    PAUSED = "paused"
    BUSY = "busy"
    DEGRADED = "some instances serve, others are coming back"
    WELL = "well"


class _Row(NamedTuple):
    """Statuses of the health routes."""

    live: int
    ready: int
    healthy: int  # /health and /v2/models/{model}/ready


_ROWS: dict[Condition, _Row] = {
    Condition.GIVEN_UP: _Row(500, 500, 500),
    Condition.STOPPING: _Row(503, 503, 503),
    Condition.LOADING: _Row(200, 503, 503),
    Condition.HEALING: _Row(200, 503, 503),
    Condition.ABNORMAL: _Row(500, 500, 500),
    Condition.PAUSED: _Row(200, 503, 503),
    Condition.BUSY: _Row(200, 503, 200),
    Condition.DEGRADED: _Row(200, 200, 200),
    Condition.WELL: _Row(200, 200, 200),
}

# without an engine that could be asked
UNAVAILABLE = frozenset({Condition.GIVEN_UP, Condition.STOPPING, Condition.LOADING, Condition.HEALING})


class Verdict(NamedTuple):
    """What a health route answers."""

    status: int
    message: str  # empty when there is nothing to say


@dataclass(slots=True)
class _Instance:
    """One model instance."""

    serving: bool = False
    reason: str = ""  # why it went down last, until it is up again
    lost: bool = False  # it does not come back
    progress: str = ""  # of loading


class Health:
    """Written by main.py and the checker as things happen, read by the management plane. No I/O, no clock."""

    def __init__(self, is_saturated: Callable[[], bool] = lambda: False) -> None:
        """`is_saturated`: whether the next request would be refused because the service is full."""
        self.is_saturated = is_saturated
        self._state = State.INIT
        self._ending = Ending.NOT
        self._why = ""  # of the ending, or of an abnormal or busy state
        self._instances: dict[int, _Instance] = {}

    # -- what happens -------------------------------------------------------------------------------

    def expect(self, instances: Iterable[int]) -> None:
        """The instances there are to be; before anything else."""
        self._instances = {number: _Instance() for number in instances}

    def loading(self, instance: int, phase: str, fraction: float) -> None:
        """`fraction`: 0..1 of this phase. Before the first instance_up, or after an instance_down."""
        self._instances[instance].progress = f"{phase} {fraction * 100:.0f} %"

    def opened(self) -> None:
        """Requests are taken from now on."""
        self._move(State.NORMAL)
        if not self.any_serving:
            self._move(State.ABNORMAL, "no instance can serve")

    def instance_up(self, instance: int) -> None:
        """It serves from now on, for the first time or again."""
        self._instances[instance] = _Instance(serving=True)
        if self._state is State.ABNORMAL:
            self._move(State.NORMAL)

    def instance_down(self, instance: int, reason: str, *, final: bool = False) -> None:
        """It has died and is being replaced. `final`: it is not; with the last one the service gives up."""
        self._instances[instance] = _Instance(reason=reason, lost=final)
        if all(each.lost for each in self._instances.values()) and self._ending is Ending.NOT:
            self.giving_up(reason)
        if not self.any_serving and self._state in (State.NORMAL, State.BUSY):
            self._move(State.ABNORMAL, "no instance can serve")

    def checked(self, state: State, why: str = "") -> None:
        """What the checker has found: NORMAL, BUSY or ABNORMAL. Neither a pause nor healing ends by it."""
        if self.any_serving and self._state in (State.NORMAL, State.BUSY, State.ABNORMAL):
            self._move(state, why)

    def command(self, command: Command) -> bool:
        """Carry it out; False when it failed. Raises WrongState where it is not legal."""
        legal, to = _COMMANDS[command]
        if self.is_ending or self._state not in legal:
            now = self._ending.value if self.is_ending else self._state.name
            allowed = ", ".join(sorted(state.name for state in legal))
            raise WrongState(
                f"`cmd` {command.value} ({command.name.lower()}) is not possible while the state is {now}; "
                f"possible: {allowed}; GET /v1/engine-server/running-status tells the state"
            )
        if command is Command.START and not self.any_serving:
            self._move(State.ABNORMAL, "started without an instance that can serve")
            return False
        self._move(to, f"command {command.name.lower()}")
        return True

    def stopping(self) -> None:
        """No new requests from now on. Again, or after giving up: changes nothing."""
        if self._ending is Ending.NOT:
            self._end(Ending.STOPPING, "the service is stopping")

    def giving_up(self, reason: str) -> None:
        """Nothing brings the engine back; the process is about to exit."""
        if self._ending is not Ending.GIVEN_UP:
            self._end(Ending.GIVEN_UP, reason)

    # -- what is true -------------------------------------------------------------------------------

    @property
    def any_serving(self) -> bool:
        return any(instance.serving for instance in self._instances.values())

    @property
    def is_ending(self) -> bool:
        return self._ending is not Ending.NOT

    def is_paused(self) -> bool:
        """Whether new requests are refused until an operator starts the service again."""
        return self._state in (State.PAUSE, State.READY)

    @property
    def serving(self) -> Mapping[int, bool]:
        """Whether it serves, of every instance that has been heard of."""
        return {number: instance.serving for number, instance in sorted(self._instances.items())}

    @property
    def state(self) -> State:
        """For running-status."""
        if self._ending is Ending.GIVEN_UP:
            return State.ABNORMAL
        return State.BUSY if self._state is State.NORMAL and self.is_saturated() else self._state

    @property
    def condition(self) -> Condition:
        if self._ending is not Ending.NOT:
            return Condition[self._ending.name]
        state = self.state
        if state is State.INIT:
            return Condition.LOADING
        if not self.any_serving:
            return Condition.HEALING
        if state is State.ABNORMAL:
            return Condition.ABNORMAL
        if self.is_paused():
            return Condition.PAUSED
        if state is State.BUSY:
            return Condition.BUSY
        return Condition.DEGRADED if self.degraded else Condition.WELL

    @property
    def degraded(self) -> str:
        """How many instances are missing, empty when none is: `1 of 2 instances`."""
        missing = sum(not instance.serving for instance in self._instances.values())
        return f"{missing} of {len(self._instances)} instances" if missing else ""

    # -- what is answered ---------------------------------------------------------------------------

    def live(self) -> Verdict:
        """Whether the process is worth keeping: 200 as long as it serves, loads or heals."""
        return Verdict(_ROWS[self.condition].live, self.message())

    def ready(self) -> Verdict:
        """Whether requests should be sent here now; a 200 has no message."""
        status = _ROWS[self.condition].ready
        return Verdict(status, "" if status == 200 else self.message())

    def healthy(self) -> int:
        """Status of /health and of a model's own ready, which have no body."""
        return _ROWS[self.condition].healthy

    def message(self) -> str:
        """What there is to say; empty when all is well."""
        match self.condition:
            case Condition.WELL:
                return ""
            case Condition.LOADING:
                return "; ".join(["loading", *filter(None, [", ".join(self._phases())])])
            case Condition.HEALING:
                return f"no instance can serve now; {', '.join(self._phases())}"
            case Condition.DEGRADED:
                return f"alive; {', '.join(self._phases())}"
            case Condition.BUSY:
                return f"alive but busy: {self._why or 'running and waiting requests are at their limits'}"
            case Condition.PAUSED:
                return "paused by fault-handling-command; its command 2 (start) resumes the service"
            case Condition.STOPPING | Condition.GIVEN_UP | Condition.ABNORMAL:
                return self._why

    def _phases(self) -> Iterator[str]:
        for number, instance in sorted(self._instances.items()):
            if instance.lost:
                yield f"instance {number} is lost ({instance.reason})"
            elif instance.reason:
                progress = f"; {instance.progress}" if instance.progress else ""
                yield f"instance {number} is restarting ({instance.reason}{progress})"
            elif not instance.serving:
                yield f"instance {number}: {instance.progress}"

    # -- the machine --------------------------------------------------------------------------------

    def _move(self, to: State, why: str = "") -> None:
        if to is not self._state:
            if to not in _NEXT[self._state]:
                raise EngineBug(f"health: {self._state.name} -> {to.name}")
            log.info("%s -> %s%s", self._state.name, to.name, f": {why}" if why else "")
        self._state = to
        if self._ending is Ending.NOT:
            self._why = why

    def _end(self, to: Ending, why: str) -> None:
        if to not in _NEXT_ENDING[self._ending]:
            raise EngineBug(f"health: {self._ending.name} -> {to.name}")
        self._ending, self._why = to, why
