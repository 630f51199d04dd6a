"""An instance's channels and rings to the endpoint, opened."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from engine.core import Watched
from engine.endpoint_link import EndpointLink, LinkEnds
from engine.wire.channel import Channel
from engine.wire.messages import EngineReady
from engine.wire.ring import RingReader, RingWriter
from worker.context import WorkerContext


def open_link(given: WorkerContext, greeting: Callable[[], EngineReady]) -> EndpointLink:
    """The link of the generation this worker was born with; later ones are opened by the step loop."""
    context, wire = given.control.context, given.wire

    def ends(generation: int) -> LinkEnds:
        return LinkEnds(
            commands=Channel(context, zmq.PULL, wire.command_address(generation), bind=True),
            events=Channel(context, zmq.PUSH, wire.event_address(generation)),
            prompts=RingReader(wire.prompt_ring, generation),
            tokens=RingWriter(wire.token_ring, generation),
        )

    link = EndpointLink(ends, greeting)
    link.open(given.generation)
    return link


def watched(given: WorkerContext) -> Watched:
    return Watched(given.control.channel, given.pulse, given.step_timeout_s)
