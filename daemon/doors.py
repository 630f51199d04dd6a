"""How children come in: the socket files, and the parent's hubs behind them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import zmq

from daemon.family import Child, Family
from engine.wire.channel import ControlHub
from engine.wire.messages import Message

log = logging.getLogger("server.doors")


class Doors:
    """Socket files are there only while somebody has still to connect.

    Once everybody is connected nobody needs them: not even kill -9 leaves one behind then. Behind every door
    that a living child came in by there is a hub of its own, as libzmq closes connections with their door.
    """

    def __init__(self, run_dir: Path, family: Family) -> None:
        """`run_dir`: from make_run_dir; open."""
        self._run_dir = run_dir
        self._family = family
        self._number = 0
        self._is_open = True
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._hubs: list[ControlHub] = []

    @property
    def control_address(self) -> str:
        return f"ipc://{self._run_dir}/ctl.{self._number}"

    def begin(self) -> None:
        """Listen. After the first forks: libzmq starts threads with its context."""
        self._context = zmq.Context()
        self._hubs.append(ControlHub(self._context, self.control_address))

    def end(self) -> None:
        for hub in self._hubs:
            hub.close()
        if self._context is not None:
            self._context.term()

    def open(self) -> bool:
        """Let children connect, to the parent and to each other; whether they can."""
        if self._is_open:
            return True
        assert self._context is not None
        try:
            self._run_dir.mkdir(mode=0o700)
            self._number += 1  # the socket of before is still connected to those who came in by it
            self._hubs.append(ControlHub(self._context, self.control_address))
        except (OSError, zmq.ZMQError) as error:
            log.error("no place for sockets, trying again: %s", error)
            self.close()
            return False
        self._is_open = True
        return True

    def close(self) -> None:
        shutil.rmtree(self._run_dir, ignore_errors=True)
        self._is_open = False

    def filenos(self) -> list[int]:
        """Edge-triggered: when one fires, `receive` until it ends."""
        return [hub.fileno() for hub in self._hubs]

    def receive(self) -> Iterator[tuple[Child, Message | None]]:
        """What children say; None for what is no message. Words of those that are no more are dropped."""
        self._close_deserted_hubs()
        for hub in list(self._hubs):
            for identity, message in hub.receive():
                child = next((child for child in self._family if child.identity == identity), None)
                if child is not None:
                    child.hub = hub
                    yield child, message

    def _close_deserted_hubs(self) -> None:
        """Those nobody came in by who lives, but for the newest, which may still be waiting for somebody."""
        in_use = {id(child.hub) for child in self._family}
        for hub in [hub for hub in self._hubs[:-1] if id(hub) not in in_use]:
            self._hubs.remove(hub)
            hub.close()
