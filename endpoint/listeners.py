"""All that listens: opens the planes' addresses, watches over what comes in, closes them again."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

from aiohttp import web

from endpoint.acceptor import Acceptor, SpareDescriptor
from endpoint.bounds import Bounds
from endpoint.connection_metrics import ConnectionMetrics
from endpoint.connections import ConnectionPool, connection_limits, most_connections
from endpoint.http_protocol import AppRunner
from endpoint.live_tls import LiveTls
from engine.settings import EndpointSettings, Listener

log = logging.getLogger("server.connections")
_http_log = logging.getLogger("server.aiohttp")

_SWEEP_S = 0.5  # how often overdue heads are looked for: one timer for all connections
_POLL_S = 10.0  # how often certificates are looked at

MakeApp = Callable[[Listener, LiveTls | None], web.Application]


class Listeners:
    def __init__(self, settings: EndpointSettings, make_app: MakeApp, metrics: ConnectionMetrics) -> None:
        self._settings = settings.connections
        self._make_app = make_app
        self._metrics = metrics
        limits = connection_limits(settings.listeners, self._settings.max_connections)
        self._limits = dict(zip(settings.listeners, limits, strict=True))
        self._spare = SpareDescriptor()
        self._pools: list[ConnectionPool] = []
        self._acceptors: list[Acceptor] = []
        self._runners: list[AppRunner] = []
        self._tls: dict[str, LiveTls] = {}  # by the name of its planes
        self._warn_of_descriptors()

    async def open(self, listener: Listener, sock: socket.socket) -> None:
        """Serve on `sock`, which is bound and may be listening already.

        Raises StartupError (EXIT_TLS) when a certificate cannot be used.
        """
        plane = "+".join(listener.planes)
        tls = LiveTls(listener.planes[0], listener.tls) if listener.tls is not None else None
        if tls is not None:
            self._tls[plane] = tls
        runner = AppRunner(
            self._make_app(listener, tls),
            access_log=None,
            logger=_http_log,
            auto_decompress=False,  # on the event loop; such bodies are refused, decompressed or not
            handler_cancellation=True,  # a client that hangs up must not keep generating
            keepalive_timeout=float(self._settings.keep_alive_s),
            shutdown_timeout=1.0,
        )
        await runner.setup()
        # Bound without it, so that a second daemon fails early; needed now, so that connections in
        # TIME_WAIT do not keep the next daemon from binding.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        pool = ConnectionPool(plane, self._limits[listener], self._settings, self._metrics)
        acceptor = Acceptor(sock, runner.new_protocol, pool, self._settings, tls, self._spare)
        acceptor.start()
        log.info("%s plane: at most %d connections", plane, self._limits[listener])
        self._pools.append(pool)
        self._acceptors.append(acceptor)
        self._runners.append(runner)

    def register_bounds(self, bounds: Bounds) -> None:
        pools = self._pools
        bounds.register(
            "connections",
            lambda: sum(pool.num_open for pool in pools),
            sum(self._limits.values()),
            lambda: sum(pool.refused for pool in pools),
        )

    async def watch(self) -> None:
        """Runs for ever: ends what is overdue, and follows the certificates' files."""
        polled = time.monotonic()
        while True:
            await asyncio.sleep(_SWEEP_S)
            for pool in self._pools:
                pool.sweep()
            if time.monotonic() - polled > _POLL_S:
                polled = time.monotonic()
                for tls in list(self._tls.values()):
                    await asyncio.to_thread(tls.poll)

    async def reload_certificates(self) -> list[str]:
        """Read all certificates, keys and revocation lists again, changed or not. Returns warnings.

        Raises StartupError when a file is unusable: then all listeners keep what they have.
        """
        read = [(tls, await asyncio.to_thread(tls.read)) for tls in self._tls.values()]
        for tls, material in read:
            tls.take(material)
        return [warning for _, material in read for warning in material.warnings]

    async def close(self) -> None:
        """Accept nothing more and end every connection."""
        for acceptor in self._acceptors:
            acceptor.close()
        await asyncio.gather(*(runner.cleanup() for runner in self._runners))

    def _warn_of_descriptors(self) -> None:
        wanted, most = self._settings.max_connections, most_connections()
        if wanted > most:
            log.warning(
                "BackendConfig.runtimeConfig.maxConnections=%d: %d are used, 80 %% of the limit of "
                "descriptors; raise it with ulimit -n",
                wanted, most,
            )  # fmt: skip
