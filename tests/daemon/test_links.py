"""What children are told when one of them dies, whatever they have come to by then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from daemon.family import Child, Family
from daemon.forks import Birth
from daemon.links import Links
from daemon.plan import ProcessSpec
from engine.wire.channel import Channel, ControlHub
from engine.wire.links import InstanceWire
from engine.wire.messages import EndpointDown, EndpointUp, Hello, InstanceDown, InstanceUp, Message
from engine.wire.ring import create_ring
from engine.wire.vitals import Vitals
from tests.harness import eventually

RING_SLOTS = 2


class Parent:
    """A family with one link, over a real control channel."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._address = f"ipc://{folder}/ctl"
        self._hub = ControlHub(self.context, self._address)
        name = f"mindie_test_{os.getpid()}_links"
        rings = [create_ring(f"{name}{end}", RING_SLOTS, 64) for end in ("p", "t")]
        self.family = Family()
        self.links = Links([InstanceWire(0, str(folder), *rings)], self.family)
        self._births = 0
        self._channels: list[Channel] = []

    def close(self) -> None:
        for socket in (self._hub, *self._channels):
            socket.close()
        self.context.destroy(linger=0)

    def birth(self, spec: ProcessSpec) -> Child:
        self._births += 1
        birth = Birth(spec, self._births, self.links[0].generation, Vitals(1).pulse(0))
        child = Child(birth, self._births, 0.0)
        self.family.add(child)
        if spec == LEADER:
            self.links[0].holders.add(child.identity)
        return child

    def hello(self, child: Child) -> Channel:
        channel = Channel(self.context, zmq.DEALER, self._address, identity=child.identity)
        self._channels.append(channel)
        assert channel.wait_connected(5.0)
        channel.send(Hello())
        eventually(lambda: [who for who, _ in self._hub.receive()] == [child.identity], 5.0, "Hello")
        child.hub = self._hub
        self.join()
        return channel

    def bury(self, child: Child) -> None:
        self.family.remove(child)
        self.links.part_with(child, "killed", final=False)
        self.join()

    def bury_doomed(self, child: Child) -> None:
        """One that was ended because another rank of its instance has died."""
        self.family.remove(child)
        self.links.forget(child)
        self.join()

    def quiet(self, child: Child) -> None:
        self.links[0].leave(child.identity)
        self.join()

    def join(self) -> None:
        self.links.join(lambda: True)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    parent = Parent(tmp_path)
    yield parent
    parent.close()


def heard(channel: Channel, count: int) -> list[Message]:
    messages: list[Message] = []

    def enough() -> bool:
        messages.extend(channel.receive())
        return len(messages) >= count

    eventually(enough, 5.0, f"{count} messages")
    return messages


ENDPOINT = ProcessSpec("endpoint")
LEADER = ProcessSpec("worker")
FOLLOWER = ProcessSpec("worker", rank=1)


def test_F05_a_leader_forked_just_before_the_endpoint_died_hears_of_it_after_its_hello(
    parent: Parent,
) -> None:
    endpoint = parent.birth(ENDPOINT)
    parent.hello(endpoint)
    leader = parent.birth(LEADER)
    parent.bury(endpoint)
    second = parent.hello(parent.birth(ENDPOINT))
    assert parent.links[0].broken  # the leader may touch the rings: it has not been heard of
    to_leader = parent.hello(leader)
    assert heard(to_leader, 1) == [EndpointDown()]
    parent.quiet(leader)
    assert heard(to_leader, 1) == [EndpointUp(1)]
    assert heard(second, 1) == [InstanceUp(0, 1)]


def test_F05_a_leader_that_dies_before_it_could_be_told_holds_nothing(parent: Parent) -> None:
    endpoint = parent.birth(ENDPOINT)
    parent.hello(endpoint)
    leader = parent.birth(LEADER)
    parent.bury(endpoint)
    second = parent.hello(parent.birth(ENDPOINT))
    parent.bury(leader)
    assert InstanceUp(0, 1) in heard(second, 2)
    assert not parent.links[0].broken


def test_a_rank_that_is_reaped_late_leaves_the_new_link_alone(parent: Parent) -> None:
    endpoint = parent.birth(ENDPOINT)
    to_endpoint = parent.hello(endpoint)
    assert heard(to_endpoint, 1) == [InstanceUp(0, 0)]
    leader, follower = parent.birth(LEADER), parent.birth(FOLLOWER)
    parent.bury(leader)
    assert heard(to_endpoint, 1) == [InstanceDown(0, "killed", final=False)]
    parent.quiet(endpoint)
    assert heard(to_endpoint, 1) == [InstanceUp(0, 1)]
    parent.bury_doomed(follower)
    assert not parent.links[0].broken and parent.links[0].generation == 1
    assert list(to_endpoint.receive()) == []


def test_a_link_waits_for_the_leader_that_ends_with_another_rank(parent: Parent) -> None:
    endpoint = parent.birth(ENDPOINT)
    to_endpoint = parent.hello(endpoint)
    assert heard(to_endpoint, 1) == [InstanceUp(0, 0)]
    leader, follower = parent.birth(LEADER), parent.birth(FOLLOWER)
    parent.bury(follower)
    parent.quiet(endpoint)
    assert parent.links[0].broken  # the leader has not been reaped, and may be writing to its rings
    parent.bury_doomed(leader)
    assert heard(to_endpoint, 2) == [InstanceDown(0, "killed", final=False), InstanceUp(0, 1)]
