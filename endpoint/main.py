"""Entry of the endpoint process: serve health at once, inference when the engine is ready, then drain."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from endpoint.app import BusinessPlane, make_app
from endpoint.context import EndpointContext
from endpoint.engine_client import EngineClient
from endpoint.health import Health
from endpoint.protocols.base import ModelInfo
from endpoint.protocols.registry import load_adapters
from endpoint.service import GenerationService
from endpoint.tls import make_server_context
from endpoint.tokenizer import TokenizerPool
from engine.errors import EXIT_INIT, StartupError
from engine.settings import Listener
from engine.wire.messages import Drain, InstanceDown, Progress, Ready

log = logging.getLogger("server.endpoint")

_KEEP_ALIVE_S = 75.0
_BACKLOG = 1024


def run_endpoint(given: EndpointContext) -> int:
    asyncio.run(_Endpoint(given).run())
    return 0


class _Endpoint:
    """The life of the process in one method; what it needs from the parent arrives on the control channel."""

    def __init__(self, given: EndpointContext) -> None:
        self._given = given
        self._health = Health()
        self._business = BusinessPlane(load_adapters(), given.settings)
        self._runners: list[web.AppRunner] = []

    async def run(self) -> None:
        given = self._given
        loop = asyncio.get_running_loop()
        self._drain: asyncio.Future[float] = loop.create_future()
        self._control = given.control.channel
        self._engine = EngineClient(given.wires, given.control.context)
        loop.add_reader(self._control.fileno(), self._on_control)
        loop.add_signal_handler(signal.SIGTERM, self._stop_within, 0.0)

        # Health answers while the model loads; a listener for inference alone refuses until it is ready.
        listeners = list(zip(given.settings.listeners, given.sockets, strict=True))
        for listener, sock in listeners:
            if "management" in listener.planes:
                await self._listen(listener, sock)
        self._on_control()  # what came before the reader was installed gives no edge
        service = await self._until_drain(self._make_service())
        if service is not None:
            self._business.service = service
            for listener, sock in listeners:
                if "management" not in listener.planes:
                    await self._listen(listener, sock)
            watcher = asyncio.create_task(service.watch_deadlines())
            self._health.ready = True
            self._control.send(Ready(f"{len(listeners)} listeners open"))
            deadline_s = await self._drain
            self._health.stopping = True
            service.stop_accepting()
            await service.drained(deadline_s)
            watcher.cancel()
        for runner in self._runners:
            await runner.cleanup()

    async def _until_drain(self, work: Coroutine[Any, Any, GenerationService]) -> GenerationService | None:
        """The work's result, or None when the service is stopped before it is there."""
        task = asyncio.ensure_future(work)
        until: set[asyncio.Future[Any]] = {task, self._drain}
        await asyncio.wait(until, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        return None

    async def _make_service(self) -> GenerationService:
        given = self._given
        tokenizer = await asyncio.to_thread(
            TokenizerPool,
            given.model.weight_path,
            given.settings.tokenizer_threads,
            given.model.trust_remote_code,
        )
        ready = await self._engine.wait_ready()
        info = ModelInfo(
            name=given.model.name,
            vocab_size=ready.vocab_size,
            max_iter_times=given.schedule.max_iter_times,
            max_prompt_tokens=ready.max_prompt_tokens,
            max_seq_len=ready.max_seq_len,
            max_n=given.schedule.max_n,
            generation_defaults=_generation_defaults(given.model.weight_path),
            created=int(time.time()),
        )
        return GenerationService(self._engine, tokenizer, given.settings, given.schedule, given.model, info)

    async def _listen(self, listener: Listener, sock: socket.socket) -> None:
        app = make_app(listener.planes, self._business, self._health, self._given.settings)
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a client that hangs up must not keep generating
            keepalive_timeout=_KEEP_ALIVE_S,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        # Bound without it, so that a second daemon fails early; needed now, so that connections in
        # TIME_WAIT do not keep the next daemon from binding.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tls = make_server_context(listener.tls) if listener.tls is not None else None
        await web.SockSite(runner, sock, ssl_context=tls, backlog=_BACKLOG).start()
        self._runners.append(runner)

    # -- from the parent ----------------------------------------------------------------------------

    def _on_control(self) -> None:
        for message in self._control.receive():
            match message:
                case Drain():
                    self._stop_within(message.deadline_s)
                case Progress():
                    self._health.note_progress(message.instance, message.phase, message.fraction)
                case InstanceDown():
                    self._health.ready = False
                    self._health.failed = f"instance {message.instance} died: {message.reason}"
                    self._engine.instance_down(message.instance, message.reason)
                case _:
                    log.warning("unexpected %s on the control channel", type(message).__name__)

    def _stop_within(self, deadline_s: float) -> None:
        if not self._drain.done():
            self._drain.set_result(deadline_s)


def _generation_defaults(weight_path: Path) -> Mapping[str, Any]:
    """The model's own sampling defaults; a model without the file has none."""
    try:
        defaults = json.loads((weight_path / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{weight_path}/generation_config.json cannot be read: {error}", EXIT_INIT
        ) from None
    return defaults if isinstance(defaults, dict) else {}
