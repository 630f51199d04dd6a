"""What a child inherits from the parent: addresses, rings and its own place in the process plan."""

from __future__ import annotations

from dataclasses import dataclass

import zmq

from engine.wire.channel import Channel
from engine.wire.ring import Ring

ENDPOINT = "endpoint"

_CONNECT_S = 5.0  # the parent binds right after its last fork


@dataclass(frozen=True, slots=True)
class InstanceWire:
    """Everything between the endpoint and the leader of one instance."""

    instance: int
    command_address: str
    event_address: str
    prompt_ring: Ring
    token_ring: Ring


@dataclass(frozen=True, slots=True)
class ControlLink:
    """A child's line to the parent."""

    address: str
    identity: str

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> Channel:
        """Connected, unless the parent is busy dying."""
        channel = Channel(context, zmq.DEALER, self.address, identity=self.identity)
        channel.wait_connected(_CONNECT_S)
        return channel
