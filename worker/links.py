"""An instance's channels and rings to the endpoint, opened."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from engine.core import Watched
from engine.endpoint_link import EndpointLink, LinkEnds
from engine.step_channel import StepReceiver, StepSender
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


def step_sender(given: WorkerContext) -> StepSender | None:
    """The leader's line to the other ranks of its instance; None when there are none."""
    rings = given.wire.step_rings
    if not rings:
        return None
    return StepSender([RingWriter(ring, given.generation) for ring in rings], given.step_timeout_s)


def step_receiver(given: WorkerContext) -> StepReceiver:
    return StepReceiver(RingReader(given.wire.step_rings[given.rank - 1], given.generation))


def watched(given: WorkerContext) -> Watched:
    return Watched(given.control.channel, given.pulse, given.step_timeout_s)
