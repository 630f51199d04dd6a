"""An instance's channels and rings to the endpoint, opened."""

from __future__ import annotations

import zmq

from engine.core import EngineLinks
from engine.errors import EXIT_INIT, StartupError
from engine.wire.channel import Channel
from engine.wire.ring import RingReader, RingWriter
from worker.context import WorkerContext

_CONNECT_S = 30.0  # the endpoint binds long before a model is loaded


def open_links(given: WorkerContext) -> EngineLinks:
    """Raises StartupError when the endpoint is not there."""
    context, wire = given.control.context, given.wire
    links = EngineLinks(
        instance=wire.instance,
        commands=Channel(context, zmq.PULL, wire.command_address, bind=True),
        events=Channel(context, zmq.PUSH, wire.event_address),
        prompts=RingReader(wire.prompt_ring),
        tokens=RingWriter(wire.token_ring),
    )
    if not links.events.wait_connected(_CONNECT_S):
        raise StartupError("the endpoint process did not open its event channel", EXIT_INIT)
    return links
