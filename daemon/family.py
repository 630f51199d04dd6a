"""The children that live, and how the parent talks to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from daemon.forks import Birth
from daemon.loading_pace import LoadingPace
from daemon.plan import ProcessSpec
from engine.wire.channel import ControlHub
from engine.wire.messages import Fatal, Message


@dataclass(slots=True)
class Child:
    """From its fork until it has been reaped."""

    birth: Birth
    pid: int
    boot_deadline: float  # monotonic seconds
    ready: bool = False
    last_progress: float = 0.0  # when it was last logged
    pace: LoadingPace = field(default_factory=LoadingPace)
    hub: ControlHub | None = None  # where it has said Hello
    fatal: Fatal | None = None
    verdict: str = ""  # why it is being ended by us
    doomed: bool = False  # another rank of its group has died
    looks_overdue: int = 0

    @property
    def spec(self) -> ProcessSpec:
        return self.birth.spec

    @property
    def identity(self) -> str:
        return self.birth.identity

    @property
    def is_endpoint(self) -> bool:
        return self.birth.spec.role == "endpoint"

    @property
    def listens(self) -> bool:
        """Whether messages reach it."""
        return self.hub is not None

    def tell(self, message: Message) -> None:
        """Dropped when it has not said Hello yet."""
        if self.hub is not None:
            self.hub.send(self.identity, message)

    def __str__(self) -> str:
        return f"{self.spec} pid={self.pid}"


class Family:
    """All children, by pid."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}

    def __iter__(self) -> Iterator[Child]:
        return iter(list(self._children.values()))

    def __len__(self) -> int:
        return len(self._children)

    def add(self, child: Child) -> None:
        self._children[child.pid] = child

    def get(self, pid: int) -> Child | None:
        return self._children.get(pid)

    def remove(self, child: Child) -> None:
        """It has been reaped."""
        del self._children[child.pid]

    @property
    def endpoint(self) -> Child | None:
        return next((child for child in self if child.is_endpoint), None)

    def workers(self, instance: int) -> list[Child]:
        return [child for child in self if not child.is_endpoint and child.spec.instance == instance]

    def leader(self, instance: int) -> Child | None:
        return next((child for child in self.workers(instance) if child.spec.rank == 0), None)

    @property
    def unready(self) -> list[Child]:
        return [child for child in self if not child.ready]

    def tell_endpoint(self, message: Message) -> None:
        if self.endpoint is not None:
            self.endpoint.tell(message)

    def signal(self, number: int) -> None:
        """Recorded pids only, never a group: the terminal's group is not ours alone."""
        for pid in self._children:
            os.kill(pid, number)  # not yet reaped, so the pid is still theirs
