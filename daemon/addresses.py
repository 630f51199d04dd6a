"""Binding the planes' addresses before anything expensive happens, with an error that says who is there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Sequence

import psutil

from engine.errors import EXIT_ADDRESS, StartupError
from engine.settings import Listener

_DYING_S = 1.0

_KEYS = {
    "business": "ServerConfig.ipAddress/port",
    "management": "ServerConfig.managementIpAddress/managementPort",
    "metrics": "ServerConfig.managementIpAddress/metricsPort",
}


def bind_listeners(listeners: Sequence[Listener]) -> list[socket.socket]:
    """Bind every address without listening: clients are refused until the service is ready.

    Raises StartupError (exit 3) that names every address that cannot be had, and closes the others.
    """
    sockets: list[socket.socket] = []
    problems: list[str] = []
    for listener in listeners:
        try:
            sockets.append(_bind_patiently(listener))
        except OSError as error:
            problems.append(_explain(listener, error))
    if problems:
        for bound in sockets:
            bound.close()
        raise StartupError("; ".join(problems), EXIT_ADDRESS)
    return sockets


def _bind_patiently(listener: Listener) -> socket.socket:
    """Bind, waiting a moment for an address whose owner cannot be seen.

    After kill -9 the kernel closes a dead process's sockets only when its last thread is gone.
    """
    until = time.monotonic() + _DYING_S
    while True:
        try:
            return _bind(listener)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _owner(listener) or time.monotonic() > until:
                raise
        time.sleep(0.05)


def _bind(listener: Listener) -> socket.socket:
    family = socket.AF_INET6 if ":" in listener.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        try:
            # Without SO_REUSEADDR, so that a second daemon sees us even before we listen.
            sock.bind((listener.address, listener.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Perhaps only connections in TIME_WAIT; a live listener makes this fail again.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((listener.address, listener.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # see above
    except OSError:
        sock.close()
        raise
    return sock


def _explain(listener: Listener, error: OSError) -> str:
    planes = "+".join(listener.planes)
    owner = ""
    if error.errno == errno.EADDRINUSE:
        pid = _owner(listener)
        owner = f" by pid {pid}" if pid else ""
    keys = ", ".join(_KEYS[plane] for plane in listener.planes)
    return (
        f"{planes} plane: cannot bind {listener.address}:{listener.port}: "
        f"{os.strerror(error.errno or 0)}{owner}; stop that process or change {keys}"
    )


def _owner(listener: Listener) -> int | None:
    """The process to stop for the address to become free, as far as we may see it."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    taken = {(host, listener.port) for host in (listener.address, "0.0.0.0", "::")}
    for connection in connections:
        if connection.pid and _listens(connection.status, connection.laddr, taken):
            return _head_of(connection.pid, taken)
    return None


def _head_of(pid: int, taken: set[tuple[str, int]]) -> int:
    """The first parent that holds the socket too: it would replace the child."""
    with contextlib.suppress(psutil.Error):
        while (parent := psutil.Process(pid).parent()) is not None:
            theirs = parent.net_connections("tcp")
            if not any(_listens(connection.status, connection.laddr, taken) for connection in theirs):
                break
            pid = parent.pid
    return pid


def _listens(status: str, address: tuple[object, ...], taken: set[tuple[str, int]]) -> bool:
    return status == psutil.CONN_LISTEN and address in taken
