"""The management plane: health, and what is true now, from state this process already has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from endpoint import metadata
from endpoint.adapters import AdapterRegistry
from endpoint.documents import Documents
from endpoint.engine_client import EngineClient
from endpoint.fault_handling import FaultHandling
from endpoint.health import UNAVAILABLE, Condition, Health, Verdict
from endpoint.lora_api import LoraApi
from endpoint.metrics import Metrics
from endpoint.models_api import check_served
from endpoint.protocols.base import ModelInfo
from endpoint.protocols.triton import MODEL_PATH
from endpoint.trial import DEFAULT_WAIT_S, Trials, wait_time
from engine.errors import EngineFailed, InvalidRequest, ServiceUnavailable
from engine.settings import EndpointSettings, ModelSettings, ScheduleSettings

_DEGRADED = "Degraded"  # header of the health routes: how many instances are missing


class ManagementPlane:
    """Routes of api.md section 11. `info` is set once every instance is ready."""

    def __init__(
        self,
        settings: EndpointSettings,
        schedule: ScheduleSettings,
        model: ModelSettings,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self.health = Health()
        self.info: ModelInfo | None = None
        self.engine: EngineClient | None = None
        self.trials: Trials | None = None
        self.adapters: AdapterRegistry | None = None
        self.stop: Callable[[bool], Awaitable[None]] | None = None  # True: do not wait for requests
        self._settings = settings
        self._schedule = schedule
        self._model = model
        self._lora_api = LoraApi(settings, model, self._registry)
        self._fault_handling = FaultHandling(settings, self.health)
        self._documents = Documents(settings.listeners, model.name)

    def reconfigure(self, settings: EndpointSettings) -> None:
        """Tell what is in force from now on."""
        self._settings = settings

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v2/health/live", self._live),
            web.get("/v2/health/ready", self._ready),
            web.get("/health", self._healthy),
            web.get("/health/timed", self._timed),
            web.get("/health/timed-{seconds}", self._timed),
            web.get(f"{MODEL_PATH}/ready", self._model_ready),
            web.get(f"{MODEL_PATH}/getSlotCount", self._slot_count),
            web.get("/info", self._tgi_info),
            web.get("/v1/config", self._config),
            web.get("/v1/status", self._status),
            web.get("/v2/status", self._status_v2),
            web.get("/v1/engine-server/running-status", self._running_status),
            web.get("/metrics-json", self._metrics_json),
            web.get("/stopService", self._stop_service),
            *self._documents.routes(),
            *self._lora_api.routes(),
            *self._fault_handling.routes(),
        ]

    async def _live(self, request: web.Request) -> web.Response:
        return self._answer(self.health.live())

    async def _ready(self, request: web.Request) -> web.Response:
        return self._answer(self.health.ready())

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health.healthy())

    def _answer(self, verdict: Verdict) -> web.Response:
        status, message = verdict
        # a header, as the body of a service that takes requests is empty
        headers = {_DEGRADED: degraded} if (degraded := self.health.degraded) and status == 200 else {}
        if not message:
            return web.Response(status=status, headers=headers)
        return web.json_response({"message": message}, status=status, headers=headers)

    async def _timed(self, request: web.Request) -> web.Response:
        seconds = wait_time(request.match_info.get("seconds", str(DEFAULT_WAIT_S)))
        condition = self.health.condition
        if condition is Condition.GIVEN_UP:
            raise EngineFailed(self.health.message())
        if self.trials is None or self.info is None or not self.health.any_serving:
            raise ServiceUnavailable(self.health.message(), retry_after_s=5)
        # asked while stopping it still tells of the engine, not of the service
        await self.trials.run(seconds)
        return web.json_response({"status": "healthy"})

    async def _running_status(self, request: web.Request) -> web.Response:
        return web.json_response({"status": self.health.state, "errors": []})

    async def _model_ready(self, request: web.Request) -> web.Response:
        if self.info is not None:
            check_served(self.info, request.match_info["model"])
        return await self._healthy(request)

    async def _slot_count(self, request: web.Request) -> web.Response:
        info, instances = self._now()
        name, limits = request.match_info["model"], self._schedule
        return web.json_response(
            body=metadata.slot_count(info, name, instances, limits.max_batch_size, limits.block_size)
        )

    async def _tgi_info(self, request: web.Request) -> web.Response:
        info, instances = self._now()
        assert self.engine is not None
        ready = self.engine.limits()
        return web.json_response(
            body=metadata.tgi_info(
                info,
                ready.device,
                ready.dtype,
                self._settings.max_link_num,
                self._schedule.block_size,
                sum(instance.total_blocks for instance in instances),
            )
        )

    async def _config(self, request: web.Request) -> web.Response:
        info, _ = self._now()
        return web.json_response(body=metadata.server_config(info, self._model, self._schedule.block_size))

    async def _stop_service(self, request: web.Request) -> web.Response:
        """Refuse new requests, wait for the others (mode=Force: five seconds), then end the whole service."""
        if self.health.is_ending or self.stop is None:
            raise EngineFailed("the service is not serving, or is stopping already")
        mode = request.query.get("mode")
        if mode not in (None, "Force"):
            raise InvalidRequest("`mode` must be Force, or left out to wait for running requests")
        await self.stop(mode == "Force")
        return web.Response()

    async def _metrics_json(self, request: web.Request) -> web.Response:
        host, port = (request.transport.get_extra_info("sockname") if request.transport else ("", 0))[:2]
        return web.json_response(self._metrics.vector(f"{host}:{port}"))

    async def _status(self, request: web.Request) -> web.Response:
        _, instances = self._now()
        return web.json_response(metadata.status(instances, self._schedule.max_batch_size))

    async def _status_v2(self, request: web.Request) -> web.Response:
        _, instances = self._now()
        return web.json_response(metadata.status_v2(instances, self._schedule.max_batch_size))

    def _registry(self) -> AdapterRegistry:
        self._now()
        assert self.adapters is not None
        return self.adapters

    def _now(self) -> tuple[ModelInfo, Sequence[metadata.Occupancy]]:
        if self.health.condition in UNAVAILABLE or self.info is None or self.engine is None:
            raise ServiceUnavailable(self.health.message(), retry_after_s=5)
        return self.info, self.engine.occupancy()
