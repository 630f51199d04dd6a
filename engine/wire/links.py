"""What a child inherits from the parent: addresses, rings and its own place in the process plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import zmq

from engine.errors import EXIT_INIT, StartupError
from engine.wire.channel import Channel
from engine.wire.messages import Hello
from engine.wire.ring import Ring

_CONNECT_S = 5.0  # the parent binds right after its first forks, and before every later one
_LINGER_MS = 1000


@dataclass(frozen=True, slots=True)
class InstanceWire:
    """Everything between the endpoint and the leader of one instance, and between the leader and its ranks.

    The rings are the same for the life of the daemon. Each time one of the two processes is replaced, the
    link over them begins anew, with the next generation and channels of its own.
    """

    instance: int
    directory: str  # of the socket files
    prompt_ring: Ring
    token_ring: Ring
    step_rings: tuple[Ring, ...] = ()  # leader -> each further rank of the instance

    def command_address(self, generation: int) -> str:
        return f"ipc://{self.directory}/cmd.{self.instance}.{generation}"

    def event_address(self, generation: int) -> str:
        return f"ipc://{self.directory}/evt.{self.instance}.{generation}"

    def meeting_file(self, generation: int) -> Path:
        """Where the ranks find each other; it is made and removed by them."""
        return Path(self.directory) / f"ranks.{self.instance}.{generation}"

    def reset(self) -> None:
        """Empty all rings. Nobody may have an end open."""
        for ring in (self.prompt_ring, self.token_ring, *self.step_rings):
            ring.reset()


class Control:
    """A child's line to the parent, and the ZeroMQ context of this process. Open it after the fork."""

    def __init__(self, address: str, identity: str) -> None:
        self.identity = identity
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.channel = Channel(self.context, zmq.DEALER, address, identity=identity)
        if not self.channel.wait_connected(_CONNECT_S):
            raise StartupError("the parent process does not answer on its control channel", EXIT_INIT)
        self.channel.send(Hello())

    def close(self) -> None:
        """Close every socket of this process, once its last messages are out or a second has passed."""
        self.context.destroy(linger=_LINGER_MS)
