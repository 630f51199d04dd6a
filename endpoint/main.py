"""Entry of the endpoint process: serve health at once, inference when the engine is ready, then drain."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from endpoint.adapters import AdapterRegistry
from endpoint.api_keys import ApiKeys
from endpoint.app import BusinessPlane, make_app
from endpoint.checker import Checker, utilisation_of
from endpoint.context import EndpointContext
from endpoint.control_guard import ControlGuard
from endpoint.engine_client import EngineClient
from endpoint.grammars import GrammarChecker
from endpoint.instance_choice import InstanceChoice
from endpoint.listeners import Listeners
from endpoint.live_tls import LiveTls
from endpoint.management import ManagementPlane
from endpoint.metadata import Occupancy
from endpoint.metrics import Metrics
from endpoint.protocols.base import ChatFormat, ModelInfo
from endpoint.protocols.registry import load_adapters
from endpoint.service import GenerationService
from endpoint.tokenizer import TokenizerPool
from endpoint.tools.registry import FORMATS, detect
from endpoint.trial import Trials
from engine.errors import EXIT_INIT, StartupError
from engine.logs.room import audit
from engine.settings import ApiKeySettings, ChatSettings, Listener
from engine.wire.messages import (
    Drain,
    InstanceDown,
    InstanceUp,
    Linked,
    Message,
    Progress,
    Quiet,
    Ready,
    Reconfigure,
    StopRequested,
)

log = logging.getLogger("server.endpoint")

_FIRST = asyncio.FIRST_COMPLETED
_WINDOW = 1000
_FORCED_STOP_S = 5.0  # of /stopService?mode=Force
_ANSWER_S = 0.1
_BEATS = 4  # signs of life within the time limit


def run_endpoint(given: EndpointContext) -> int:
    asyncio.run(_Endpoint(given).run())
    return 0


class _Endpoint:
    """The life of the process in one method; what it needs from the parent arrives on the control channel."""

    def __init__(self, given: EndpointContext) -> None:
        self._given = given
        self._metrics = Metrics(given.model.name, _average_window(), self._occupancy)
        self._business = BusinessPlane(
            load_adapters(), given.settings, given.schedule, given.model, self._metrics
        )
        self._management = ManagementPlane(given.settings, given.schedule, given.model, self._metrics)
        self._health = self._management.health
        self._health.expect(wire.instance for wire in given.wires)
        self._keys = ApiKeys(given.settings.api_keys)
        self._started = int(time.time())
        self._listeners = Listeners(given.settings, self._make_app, self._metrics.connections)

    async def run(self) -> None:
        given = self._given
        loop = asyncio.get_running_loop()
        self._drain: asyncio.Future[float] = loop.create_future()
        self._control = given.control.channel
        self._engine = self._management.engine = EngineClient(
            given.wires,
            given.control.context,
            lambda has: self._adapters.wanted(has),
            self._on_serving,
            InstanceChoice(
                given.schedule.block_size,
                given.schedule.max_batch_size,
                prefix_cache=given.schedule.prefix_cache,
            ),
        )
        self._trials = self._management.trials = Trials(self._engine)
        self._adapters = self._management.adapters = AdapterRegistry(
            given.model.lora, given.model.name, self._engine, adopts=given.replaces_another
        )
        loop.add_reader(self._control.fileno(), self._hear_parent)
        loop.add_signal_handler(signal.SIGTERM, self._stop_within, 0.0)
        beat = asyncio.create_task(self._show_life())

        # Health answers while the model loads; a listener for inference alone refuses until it is ready.
        listening = asyncio.create_task(self._listeners.watch())
        listeners = list(zip(given.settings.listeners, given.sockets, strict=True))
        for listener, sock in listeners:
            if "management" in listener.planes:
                await self._listeners.open(listener, sock)
        self._hear_parent()  # what came before the reader was installed gives no edge
        service = await self._unless_stopped(self._make_service())
        if service is not None:
            self._business.service = service
            self._management.info = service.info
            self._management.stop = partial(self._stop_over_http, service)
            for listener, sock in listeners:
                if "management" not in listener.planes:
                    await self._listeners.open(listener, sock)
            service.register_bounds(self._metrics.bounds)
            self._metrics.watch_refusals(service.admission.refused)
            self._metrics.watch_refusals(self._keys.refused)
            self._adapters.register_bounds(self._metrics.bounds)
            self._listeners.register_bounds(self._metrics.bounds)
            service.is_paused = self._health.is_paused
            background = [asyncio.create_task(service.watch_deadlines())]
            if given.settings.npu_usage_threshold:
                background.append(asyncio.create_task(self._checker().run()))
            self._health.is_saturated = service.is_saturated
            self._health.opened()
            self._tell_parent(Ready(f"{len(listeners)} listeners open"))
            # none of these ends but by a failure, which must end the process
            failures: set[asyncio.Future[Any]] = {*background, listening, self._engine.failure, beat}
            await asyncio.wait({self._drain, *failures}, return_when=_FIRST)
            for failure in failures:
                if failure.done():
                    failure.result()
            self._health.stopping()
            audit("system", "stop endpoint", "success")
            service.stop_accepting()
            await service.drained(self._drain.result())
            for task in background:
                task.cancel()
            await self._grammars.close()
        beat.cancel()
        listening.cancel()
        await self._listeners.close()

    async def _show_life(self) -> None:
        """Runs for ever: a loop that is stuck is an endpoint to be replaced."""
        limit_s = self._given.step_timeout_s
        while True:
            self._given.pulse.expect_within(limit_s)
            await asyncio.sleep(limit_s / _BEATS)

    async def _stop_over_http(self, service: GenerationService, force: bool) -> None:
        self._health.stopping()
        service.stop_accepting()
        self._stopping = asyncio.create_task(self._ask_for_stop(service, force))
        await asyncio.shield(self._stopping)  # whoever asked may hang up; nothing is taken any more, so go on

    async def _ask_for_stop(self, service: GenerationService, force: bool) -> None:
        if not force:
            await service.idle()
        # the answer leaves first: the parent's Drain closes this listener
        drain_s = _FORCED_STOP_S if force else 0.0
        asyncio.get_running_loop().call_later(_ANSWER_S, self._tell_parent, StopRequested(drain_s))

    def _checker(self) -> Checker:
        utilisation = utilisation_of(self._engine.limits().device)
        return Checker(self._health, self._trials, utilisation, self._given.settings.npu_usage_threshold)

    def _occupancy(self) -> Sequence[Occupancy]:
        return self._engine.occupancy()

    async def _unless_stopped(self, work: Coroutine[Any, Any, GenerationService]) -> GenerationService | None:
        """The work's result, or None when the service is stopped before it is there."""
        task = asyncio.ensure_future(work)
        until: set[asyncio.Future[Any]] = {task, self._drain}
        await asyncio.wait(until, return_when=_FIRST)
        if task.done():
            return task.result()
        task.cancel()
        return None

    async def _make_service(self) -> GenerationService:
        given = self._given
        # a pool of its own: the loop waits for the default one, and a stop must not wait for a slow tokenizer
        load_tokenizer = partial(
            TokenizerPool,
            given.model.weight_path,
            given.settings.tokenizer_threads,
            given.model.trust_remote_code,
            mock=given.model.instance_type == "StandardMock",
            chat_template=given.model.chat.template,
        )
        tokenizer = await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), load_tokenizer)
        # beside the other instances, one that is being replaced is no reason to keep clients waiting
        ready = await self._engine.wait_ready(every=not given.replaces_another)
        tokenizer.check_fits(ready.vocab_size)
        info = ModelInfo(
            name=given.model.name,
            vocab_size=ready.vocab_size,
            max_iter_times=given.schedule.max_iter_times,
            max_prompt_tokens=ready.max_prompt_tokens,
            max_seq_len=ready.max_seq_len,
            max_n=given.schedule.max_n,
            max_batch_size=given.schedule.max_batch_size,
            generation_defaults=_generation_defaults(given.model.weight_path),
            created=self._started,
            chat=_chat_format(given.model.chat, tokenizer),
            adapters=self._adapters.loaded,
            one_answer=given.schedule.async_scheduling,
        )
        self._grammars = GrammarChecker(partial(tokenizer.vocabulary, ready.vocab_size))
        return GenerationService(
            self._engine,
            tokenizer,
            given.settings,
            given.schedule,
            given.model,
            info,
            self._metrics,
            self._grammars,
        )

    def _make_app(self, listener: Listener, tls: LiveTls | None) -> web.Application:
        settings = self._given.settings
        guard = ControlGuard(
            (lambda: tls.material.names) if tls is not None else frozenset, settings.connections.allowed_hosts
        )
        if tls is not None:
            for plane in listener.planes:
                self._metrics.watch_certificate(plane, tls.days_left)
        return make_app(
            listener.planes, self._business, self._management, self._metrics, settings, self._keys, guard
        )

    # -- from the parent ----------------------------------------------------------------------------

    def _hear_parent(self) -> None:
        """An event loop only logs what a callback raises; here it is the end of this process."""
        try:
            self._on_control()
        except Exception as error:
            self._engine.fail(error)

    def _on_control(self) -> None:
        for message in self._control.receive():
            match message:
                case Drain():
                    self._stop_within(message.deadline_s)
                case Progress():
                    self._health.loading(message.instance, message.phase, message.fraction)
                case InstanceUp():
                    self._engine.open_instance(message.instance, message.generation)
                case Reconfigure():
                    self._reconfigure(message)
                case InstanceDown():
                    self._health.instance_down(message.instance, message.reason, final=message.final)
                    generation = self._engine.close_instance(message.instance, final=message.final)
                    self._control.send(Quiet(message.instance, generation))
                case _:
                    log.warning("unexpected %s on the control channel", type(message).__name__)

    def _on_serving(self, instance: int, generation: int) -> None:
        self._health.instance_up(instance)
        self._tell_parent(Linked(instance, generation))

    def _tell_parent(self, message: Message) -> None:
        self._control.send(message)
        # sending may have taken the edge of what arrived meanwhile
        asyncio.get_running_loop().call_soon(self._hear_parent)

    def _reconfigure(self, wanted: Reconfigure) -> None:
        settings = replace(
            self._given.settings,
            openai_flavour="vllm" if wanted.openai_flavour == "vllm" else "openai",
            token_timeout_s=wanted.token_timeout_s,
            e2e_timeout_s=wanted.e2e_timeout_s,
            max_link_num=wanted.max_link_num,
            max_waiting_tokens=wanted.max_waiting_tokens,
            api_keys=tuple(ApiKeySettings(*fields) for fields in wanted.api_keys),
        )
        self._keys.replace(settings.api_keys)
        self._management.reconfigure(settings)
        if self._business.service is not None:
            self._business.service.reconfigure(settings)
        if wanted.reload_certificates:
            self._reloading = asyncio.create_task(self._reload_certificates())

    async def _reload_certificates(self) -> None:
        """New connections get the new material; the parent has looked at it already."""
        try:
            await self._listeners.reload_certificates()
        except StartupError as error:  # it changed again since
            log.warning("certificates stay as they were: %s", error)

    def _stop_within(self, deadline_s: float) -> None:
        if not self._drain.done():
            self._drain.set_result(deadline_s)


def _average_window() -> int:
    """Requests in the moving averages of /metrics-json."""
    wanted = os.environ.get("DYNAMIC_AVERAGE_WINDOW_SIZE", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if wanted:
        log.warning("DYNAMIC_AVERAGE_WINDOW_SIZE=%r is no positive integer; using %d", wanted, _WINDOW)
    return _WINDOW


def _chat_format(chat: ChatSettings, tokenizer: TokenizerPool) -> ChatFormat:
    name = chat.tool_call_parser or detect(tokenizer.template_source)
    special = {
        text: tokenizer.special_by_text[text]
        for text in FORMATS[name].markers
        if text in tokenizer.special_by_text
    }
    return ChatFormat(tools=name, reasoning=chat.reasoning, special_ids=special)


def _generation_defaults(weight_path: Path) -> Mapping[str, Any]:
    """The model's own sampling defaults; a model without the file has none."""
    try:
        defaults = json.loads((weight_path / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(
            f"{weight_path}/generation_config.json cannot be read: {error}", EXIT_INIT
        ) from None
    return defaults if isinstance(defaults, dict) else {}
