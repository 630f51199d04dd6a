"""Who is connected to a listener, who gives way when it is full, and whose request is overdue.

Every list is kept in the order in which its deadlines fall, so that neither a sweep nor an eviction looks
at more connections than it ends.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

from endpoint.connection_metrics import ConnectionMetrics
from engine.settings import ConnectionSettings, Listener

_MOST = 10_000
_SHARE_OF_DESCRIPTORS = 0.8  # the rest is for pipes, sockets of children, files
_MOST_RESERVED = 100  # for a listener of operators, whatever business does
_LEAST_RESERVED = 8
_MOST_UNREAD_BYTES = 1 << 20  # of a client that reads slower than its answer is made


class Connection(Protocol):
    def abort(self) -> None:
        """Close at once, whatever is still to be written."""

    def end_slow_head(self) -> None:
        """Its head is overdue."""

    def backlog_bytes(self) -> int:
        """What waits in this process to be written to it."""

    def end_slow_body(self) -> bool:
        """Its body may be overdue. Returns whether it is."""


class ConnectionPool:
    """The connections of one listener.

    A connection is idle from accept to the end of its first request's head, and from an answer's end to the
    end of the next head. Idle ones give way, those that wait for an answer never do.
    """

    def __init__(
        self, plane: str, limit: int, settings: ConnectionSettings, metrics: ConnectionMetrics
    ) -> None:
        """`plane`: what metrics call the listener."""
        self.plane = plane
        self.metrics = metrics
        self._limit = limit
        self._head_timeout_s = settings.head_timeout_s
        self._body_timeout_s = settings.body_timeout_s
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # idle for longest first
        self._heads: dict[Connection, float] = {}  # when each must be complete (monotonic), soonest first
        self._bodies: dict[Connection, float] = {}  # in the same way, for bodies that did not come at once
        self._blocked: set[Connection] = set()  # their buffers are full
        self.refused = 0  # since the start
        metrics.watch(plane, limit, self._open)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def make_room(self) -> bool:
        """Whether one more may come; when it is full, the one that has been idle for longest goes."""
        if len(self._open) < self._limit or self.evict(1) == 1:
            return True
        self.refused += 1
        self.metrics.closed(self.plane, "refused")
        return False

    def evict(self, count: int) -> int:
        """End up to `count` idle connections. Returns how many there were."""
        victims = [connection for connection, _ in zip(self._idle, range(count), strict=False)]
        for connection in victims:
            self.remove(connection)
            connection.abort()
            self.metrics.closed(self.plane, "evicted")
        return len(victims)

    def add(self, connection: Connection) -> None:
        self._open.add(connection)
        self._idle[connection] = None

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._heads.pop(connection, None)
        self._bodies.pop(connection, None)
        self._blocked.discard(connection)

    def head_begins(self, connection: Connection) -> None:
        """Its first byte is there, or the connection is new; from then on more bytes give no more time."""
        if connection in self._idle:
            self._heads.setdefault(connection, time.monotonic() + self._head_timeout_s)

    def request_begins(self, connection: Connection) -> None:
        """The head is complete."""
        self._idle.pop(connection, None)
        self._heads.pop(connection, None)

    def body_begins(self, connection: Connection) -> None:
        """The head's handler runs, and the body is not there yet."""
        self._bodies[connection] = time.monotonic() + self._body_timeout_s

    def body_ends(self, connection: Connection) -> None:
        """It is there, or nobody waits for it any more."""
        self._bodies.pop(connection, None)

    def request_ends(self, connection: Connection) -> None:
        """The answer is written, and no further request is there."""
        if connection in self._open:
            self._idle[connection] = None

    def writing_stops(self, connection: Connection) -> None:
        """The client does not read as fast as is written."""
        self._blocked.add(connection)

    def writing_goes_on(self, connection: Connection) -> None:
        self._blocked.discard(connection)

    def sweep(self) -> None:
        """End what is overdue, and the connections that take too much memory."""
        now = time.monotonic()
        for connection in _take_overdue(self._heads, now):
            # still idle until it is lost, so that it gives way while it lingers
            connection.end_slow_head()
            self.metrics.closed(self.plane, "slow_head")
        for connection in _take_overdue(self._bodies, now):
            if connection.end_slow_body():
                self.metrics.closed(self.plane, "slow_body")
        for connection in [one for one in self._blocked if one.backlog_bytes() > _MOST_UNREAD_BYTES]:
            self._blocked.discard(connection)
            connection.abort()
            self.metrics.closed(self.plane, "stalled")


def _take_overdue(deadlines: dict[Connection, float], now: float) -> list[Connection]:
    """Those whose deadline has passed, removed. `deadlines` ascend."""
    overdue = list(takewhile(lambda connection: deadlines[connection] <= now, deadlines))
    for connection in overdue:
        del deadlines[connection]
    return overdue


def connection_limits(listeners: Sequence[Listener], wanted: int) -> list[int]:
    """How many connections each listener may have, `wanted` (0: as many as is sensible) in all.

    Listeners without business have few of their own, so that probes and scrapes work while business is full.
    """
    total = min(wanted or _MOST, most_connections())
    reserved = min(_MOST_RESERVED, max(_LEAST_RESERVED, total // 10))
    business = total - reserved * sum("business" not in listener.planes for listener in listeners)
    return [business if "business" in listener.planes else reserved for listener in listeners]


def most_connections() -> int:
    """What this process's limit of descriptors allows."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return int(descriptors * _SHARE_OF_DESCRIPTORS) if descriptors != resource.RLIM_INFINITY else _MOST * 100
