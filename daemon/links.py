"""The links between the endpoint and each leader: who may be touching the rings, and when they begin anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from daemon.family import Child, Family
from engine.wire.links import InstanceWire
from engine.wire.messages import EndpointDown, EndpointUp, InstanceDown, InstanceUp


@dataclass(slots=True)
class Link:
    """Between the endpoint and the leader of one instance, over the lives of both.

    When one of them dies the link is broken. Its rings may be reset once the dead one has been reaped and the
    other has said that its own end is closed; then the next generation begins.
    """

    wire: InstanceWire
    generation: int = 0
    broken: bool = False
    complete: bool = False  # the leader has greeted the endpoint over it
    holders: set[str] = field(default_factory=set)  # identities of the children that may touch the rings
    owed_word: set[str] = field(default_factory=set)  # those that have to let go and cannot be told yet

    def break_off(self) -> None:
        self.broken = True
        self.complete = False

    def leave(self, identity: str) -> None:
        self.holders.discard(identity)
        self.owed_word.discard(identity)

    def mend(self) -> bool:
        """Begin anew if that is needed and nobody holds the rings any more; whether the link can be used."""
        if self.broken and not self.holders:
            self.wire.reset()
            self.generation += 1
            self.broken = False
        return not self.broken


class Links:
    """One link per instance."""

    def __init__(self, wires: Sequence[InstanceWire], family: Family) -> None:
        self._links = [Link(wire) for wire in wires]
        self._family = family

    def __getitem__(self, instance: int) -> Link:
        return self._links[instance]

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    @property
    def complete(self) -> bool:
        return all(link.complete for link in self._links)

    def part_with(self, dead: Child, reason: str, *, final: bool) -> None:
        """Break off what the dead child was part of, and tell those at the other ends.

        `final`: it will not be replaced.
        """
        for link in self._links:
            instance = link.wire.instance
            if dead.is_endpoint and dead.identity in link.holders:
                link.break_off()
                link.owed_word = link.holders - {dead.identity}
                self._tell_to_let_go(link)
            elif not dead.is_endpoint and dead.spec.instance == instance:
                link.break_off()
                self._family.tell_endpoint(InstanceDown(instance, reason, final))
            link.leave(dead.identity)

    def forget(self, dead: Child) -> None:
        """It was ended with another rank of its instance, of whose death everybody has been told."""
        self._links[dead.spec.instance].leave(dead.identity)

    def join(self, open_doors: Callable[[], bool]) -> None:
        """Tell every link that has begun anew to those of its two sides that live and do not know it yet."""
        for link in self._links:
            self._tell_to_let_go(link)
            if not link.mend() or not open_doors():
                continue
            instance = link.wire.instance
            endpoint, leader = self._family.endpoint, self._family.leader(instance)
            if endpoint is not None and endpoint.listens and endpoint.identity not in link.holders:
                link.holders.add(endpoint.identity)
                endpoint.tell(InstanceUp(instance, link.generation))
            if leader is not None and leader.listens and leader.identity not in link.holders:
                link.holders.add(leader.identity)
                leader.tell(EndpointUp(link.generation))

    def _tell_to_let_go(self, link: Link) -> None:
        """Its leader, that the endpoint is gone; one that has just been forked hears it after its Hello."""
        leader = self._family.leader(link.wire.instance)
        if leader is not None and leader.listens and leader.identity in link.owed_word:
            link.owed_word.discard(leader.identity)
            leader.tell(EndpointDown())
