"""The parent's view of an instance's link: who may be touching its rings, and when it can begin anew."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.wire.links import InstanceWire


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

    def break_off(self) -> None:
        self.broken = True
        self.complete = False

    def leave(self, identity: str) -> None:
        self.holders.discard(identity)

    def mend(self) -> bool:
        """Begin anew if that is needed and nobody holds the rings any more; whether the link can be used."""
        if self.broken and not self.holders:
            self.wire.prompt_ring.reset()
            self.wire.token_ring.reset()
            self.generation += 1
            self.broken = False
        return not self.broken
