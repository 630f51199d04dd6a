"""The endpoint's ends of one instance's channels and rings."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import zmq

from endpoint.instance_choice import Burden
from engine.wire.channel import Channel
from engine.wire.links import InstanceWire
from engine.wire.messages import EngineReady, EngineStats, Message
from engine.wire.ring import RingReader, RingWriter


class LinkEnds(NamedTuple):
    """Of one generation."""

    commands: Channel
    events: Channel
    prompts: RingWriter
    tokens: RingReader


class InstanceLink:
    """One instance as the endpoint knows it, over the lives of its leader."""

    def __init__(self, wire: InstanceWire, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.instance = wire.instance
        self.generation = -1
        self.wire = wire
        self._context = context
        self.ends: LinkEnds | None = None  # None: before the first opening, and after the instance's death
        self.prompt_lock = asyncio.Lock()  # record and Submit must leave in the same order
        self.ready: EngineReady | None = None  # what it can take, as last told
        self.serving = False  # it has greeted, and has the adapters it should have
        self.stats: EngineStats | None = None
        self.adapter_waits: dict[str, asyncio.Future[str]] = {}  # by adapter: the answer that is awaited
        self.burden = Burden()

    def open(self, generation: int) -> LinkEnds:
        self.generation = generation
        self.burden.forget_blocks()
        self.ends = LinkEnds(
            Channel(self._context, zmq.PUSH, self.wire.command_address(generation)),
            Channel(self._context, zmq.PULL, self.wire.event_address(generation), bind=True),
            RingWriter(self.wire.prompt_ring, generation),
            RingReader(self.wire.token_ring, generation),
        )
        return self.ends

    def send(self, message: Message) -> bool:
        return self.ends is not None and self.ends.commands.send(message)

    @property
    def total_blocks(self) -> int:
        """Of its cache; 0 before its first greeting."""
        return self.ready.num_blocks if self.ready is not None else 0

    @property
    def free_blocks(self) -> int:
        """As last told, at most a second ago."""
        return self.stats.free_blocks if self.stats is not None else self.total_blocks
