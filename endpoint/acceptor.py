"""Takes connections from a listening socket: as many as there is room for, also when descriptors run out.

asyncio's own accept loop knows no limit, keeps its TLS context for ever, swallows the reasons of failed
handshakes, and writes a traceback per accept when there is no descriptor left.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from functools import partial

from endpoint.connections import ConnectionPool
from endpoint.handshakes import MEANING, failure
from endpoint.http_protocol import HttpProtocol, last_answer
from endpoint.live_tls import LiveTls
from endpoint.quiet_log import QuietLog
from engine.errors import ServiceUnavailable
from engine.settings import ConnectionSettings

log = logging.getLogger("server.connections")

_BACKLOG = 1024
_ACCEPTS_PER_TURN = 16  # then the connections that are there get their turn
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_S = 0.2  # of accepting, without a descriptor
_LINGER_S = 1.0  # a refused client gets its answer only while its socket is open
_MOST_LINGERING = 64
_UNSENT_BYTES = 131_072  # what the kernel takes ahead of the client, for each connection
_KEEPALIVE_S, _KEEPALIVE_PROBES_S = 60, 10

# asyncio's TLS reads into a buffer of 256 KiB per connection: 300 KiB of memory for a silent client, 80 KiB
# with this; a TLS record has at most 16 KiB
asyncio.sslproto.SSLProtocol.max_size = 32_768  # type: ignore[attr-defined]

_FULL = last_answer(
    ServiceUnavailable(
        "too many open connections (config key runtimeConfig.maxConnections); close idle ones, try again",
        retry_after_s=1,
    )
)


class SpareDescriptor:
    """A descriptor kept back, so that the last client can be told that there are none left."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self.take()

    def take(self) -> None:
        if self._fd is None:
            with contextlib.suppress(OSError):  # others were faster: then clients wait for one
                self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def give(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Acceptor:
    """One listening socket's; `start` and `close` it once."""

    def __init__(
        self,
        sock: socket.socket,
        new_protocol: Callable[[], HttpProtocol],
        pool: ConnectionPool,
        settings: ConnectionSettings,
        tls: LiveTls | None,
        spare: SpareDescriptor,
    ) -> None:
        """`sock`: bound; it may be listening already. `spare`: the process has one."""
        self._sock = sock
        self._new_protocol = new_protocol
        self._pool = pool
        self._settings = settings
        self._tls = tls
        self._spare = spare
        self._quiet = QuietLog(log)
        self._opening: set[asyncio.Task[None]] = set()
        self._lingering: set[socket.socket] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Raises OSError when the address is taken by now."""
        self._sock.setblocking(False)
        _limit_waiting(self._sock, self._settings.write_stall_s)
        self._sock.listen(_BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept nothing more; what has been accepted goes on."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._opening:
            task.cancel()
        for conn in self._lingering:
            conn.close()

    # -- accepting ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                conn, peer = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._on_exhausted(error)
                return
            conn.setblocking(False)
            if not self._pool.make_room():
                self._quiet.warning(
                    "full", f"{self._pool.plane} plane: no room for more connections, and none is idle"
                )
                self._refuse(conn)
                continue
            self._enter(conn, peer)

    def _enter(self, conn: socket.socket, peer: tuple[object, ...]) -> None:
        protocol = self._new_protocol()
        opening = self._loop.create_task(self._open(conn, protocol))
        self._opening.add(opening)
        protocol.enter(self._pool, opening)
        opening.add_done_callback(partial(self._on_opened, conn, peer, protocol))

    async def _open(self, conn: socket.socket, protocol: HttpProtocol) -> None:
        tls = self._tls
        await self._loop.connect_accepted_socket(
            lambda: protocol,
            conn,
            ssl=tls.material.context if tls else None,
            ssl_handshake_timeout=float(self._settings.handshake_timeout_s) if tls else None,
        )

    def _on_opened(
        self,
        conn: socket.socket,
        peer: tuple[object, ...],
        protocol: HttpProtocol,
        opening: asyncio.Task[None],
    ) -> None:
        self._opening.discard(opening)
        error = None if opening.cancelled() else opening.exception()
        if error is None and not opening.cancelled():
            return
        self._pool.remove(protocol)  # nobody else notices its end
        conn.close()  # cancelled before its first step, the task has not begun to own it
        if isinstance(error, OSError) and self._tls is not None:
            self._on_handshake_failure(error, peer[0])
        elif error is not None and not isinstance(error, OSError):
            log.error("%s plane: a connection could not be opened", self._pool.plane, exc_info=error)

    def _on_handshake_failure(self, error: OSError, address: object) -> None:
        cause, plane = failure(error), self._pool.plane
        self._pool.metrics.handshake_failed(plane, cause)
        if cause == "gave_up":
            return  # probes of ports do just that, all day
        self._quiet.warning(cause, f"{plane} plane: no TLS: {MEANING[cause]}", str(address))

    def _refuse(self, conn: socket.socket) -> None:
        """Say why on a plain connection, and close it when that has been read; TLS is just closed."""
        if self._tls is not None or len(self._lingering) >= _MOST_LINGERING:
            conn.close()
            return
        with contextlib.suppress(OSError):
            conn.send(_FULL)
            conn.shutdown(socket.SHUT_WR)
        self._lingering.add(conn)
        self._loop.call_later(_LINGER_S, self._let_go, conn)

    def _let_go(self, conn: socket.socket) -> None:
        self._lingering.discard(conn)
        conn.close()

    # -- without descriptors ------------------------------------------------------------------------

    def _on_exhausted(self, error: OSError) -> None:
        """Refuse one client through the spare descriptor, make idle ones give way, and wait a moment."""
        self._pool.metrics.closed(self._pool.plane, "no_descriptor")
        self._quiet.warning(
            "no_descriptor",
            f"{self._pool.plane} plane: accept: {os.strerror(error.errno or 0)}; trying again every "
            f"{_PAUSE_S:g} s; raise the limit (ulimit -n) or lower runtimeConfig.maxConnections",
        )
        self._spare.give()
        with contextlib.suppress(OSError):
            conn, _ = self._sock.accept()
            with conn, contextlib.suppress(OSError):
                conn.setblocking(False)
                if self._tls is None:
                    conn.send(_FULL)
                    conn.recv(65_536)  # closing upon unread bytes would reset what was just sent
        self._spare.take()
        self._pool.evict(_ACCEPTS_PER_TURN)
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._spare.take()
        self._loop.add_reader(self._sock.fileno(), self._accept)


def _limit_waiting(sock: socket.socket, stall_s: int) -> None:
    """Let the kernel end connections whose client takes nothing; accepted sockets inherit these options.

    TCP_USER_TIMEOUT covers clients that never read (their window stays shut) and those that have vanished;
    it costs nothing while all is well. Keepalive finds the vanished ones that nothing is written to.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_s * 1000)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_PROBES_S)
