"""The aiohttp application of one listener: routes of its planes, body limits, errors in one place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aiohttp import web
from aiohttp.typedefs import Middleware

from endpoint import http_errors, metadata, models_api
from endpoint.api_keys import PUBLIC_PATHS, ApiKey, ApiKeys
from endpoint.audit import audit_request
from endpoint.control_guard import ControlGuard
from endpoint.generation_stream import GenerationStream
from endpoint.http_protocol import bound_backlog, make_canonical
from endpoint.json_body import parse_body
from endpoint.management import ManagementPlane
from endpoint.metadata import SERVER_NAME
from endpoint.metrics import CONTENT_TYPE, Metrics, Outcome
from endpoint.protocols.base import Body, Completion, GenerationRequest, ModelInfo, ProtocolAdapter, Reply
from endpoint.protocols.triton import MODEL_PATH, stop_infer_id
from endpoint.request_body import read_body
from endpoint.request_id import internal_id, new_uuid
from endpoint.request_log import (
    Breakdown,
    RequestRecord,
    recorded,
    server_timing,
    timing_comment,
    wants_timings,
)
from endpoint.service import GenerationService
from endpoint.token_count import parse_count
from engine.errors import EngineFailed, InvalidRequest, ServerError, ServiceUnavailable, WrongState
from engine.logs.codes import REQUEST_FAILED, STREAM_FAILED, code
from engine.settings import EndpointSettings, ModelSettings, Plane, ScheduleSettings

log = logging.getLogger("server.http")

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_UUID = web.RequestKey("uuid", str)
_KEY = web.RequestKey("api_key", ApiKey)  # absent where no keys are configured
_INLINE_ENTRIES = 2000  # tokens, and probabilities beside them; writing one takes some 5 us
_INLINE_BYTES = 65_536  # of a body that is parsed on the event loop
_STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


class BusinessPlane:
    """Inference and model queries. `service` is set once every instance is ready."""

    def __init__(
        self,
        adapters: Sequence[ProtocolAdapter],
        settings: EndpointSettings,
        schedule: ScheduleSettings,
        model: ModelSettings,
        metrics: Metrics,
    ) -> None:
        self.service: GenerationService | None = None
        self._settings = settings
        self._schedule = schedule
        self._model_settings = model
        self._metrics = metrics
        self._by_path: dict[str, list[ProtocolAdapter]] = {}
        for adapter in adapters:
            for path in adapter.routes:
                self._by_path.setdefault(path, []).append(adapter)

    def routes(self) -> list[web.RouteDef]:
        return [
            *(web.post(path, self._generation_handler(adapters)) for path, adapters in self._by_path.items()),
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model}", self._model),
            web.post("/v1/tokenizer", self._count_tokens),
            web.get("/v2", self._server_metadata),
            web.get(MODEL_PATH, self._model_metadata),
            web.get(f"{MODEL_PATH}/config", self._model_config),
            web.post(f"{MODEL_PATH}/stopInfer", self._stop_infer),
            web.get("/dresult", self._decode_results),
        ]

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(body=models_api.model_list(self._ready_service().info))

    async def _model(self, request: web.Request) -> web.Response:
        info = self._ready_service().info
        return web.json_response(body=models_api.model_card(info, request.match_info["model"]))

    async def _count_tokens(self, request: web.Request) -> web.Response:
        service = self._ready_service()
        asked = parse_count(parse_body(await self._read_body(request), self._settings.max_json_depth))
        return web.json_response(body=await service.count_tokens(asked, request.get(_KEY)))

    async def _server_metadata(self, request: web.Request) -> web.Response:
        return web.json_response(body=metadata.server_metadata(self._schedule))

    async def _model_metadata(self, request: web.Request) -> web.Response:
        info = self._ready_service().info
        return web.json_response(body=metadata.model_metadata(info, request.match_info["model"]))

    async def _model_config(self, request: web.Request) -> web.Response:
        info = self._ready_service().info
        name = request.match_info["model"]
        return web.json_response(body=metadata.model_config(info, self._model_settings, name))

    async def _stop_infer(self, request: web.Request) -> web.Response:
        service = self._ready_service()
        models_api.check_served(service.info, request.match_info["model"])
        body = parse_body(await self._read_body(request), self._settings.max_json_depth)
        client_id = stop_infer_id(body)
        service.cancel(client_id, request.get(_KEY))
        return web.json_response({"id": client_id})

    async def _decode_results(self, request: web.Request) -> web.Response:
        raise WrongState(
            "this server does prefill and decode itself: there are no results of another to fetch"
        )

    def _generation_handler(self, adapters: Sequence[ProtocolAdapter]) -> Handler:
        async def handle(http: web.Request) -> web.StreamResponse:
            with self._metrics.request() as outcome, recorded(http, http[_UUID]) as record:
                return await generate(http, outcome, record)

        async def generate(http: web.Request, outcome: Outcome, record: RequestRecord) -> web.StreamResponse:
            service = self._ready_service()
            if "model" in http.match_info:  # a wrong path is wrong whatever the body says
                models_api.check_served(service.info, http.match_info["model"])
            key = http.get(_KEY)
            service.check_room(key)
            raw = await self._read_body(http)
            if len(raw) <= _INLINE_BYTES:
                adapter, body, request = parse(raw, service.info, http)
            else:  # milliseconds, or with many small values a second, that nobody else is to wait for
                adapter, body, request = await asyncio.to_thread(parse, raw, service.info, http)
            record.dialect = adapter.name
            name = internal_id(http.headers, http[_UUID])
            async with service.open(request, name, record, key) as stream:
                reply = adapter.reply(request, body, stream.context)
                tell = record.breakdown if wants_timings(http) else None
                response = await _answer(http, http[_UUID], request, stream, reply, tell)
                outcome.ok = stream.complete
                return response

        def parse(
            raw: bytes, info: ModelInfo, http: web.Request
        ) -> tuple[ProtocolAdapter, Body, GenerationRequest]:
            body = parse_body(raw, self._settings.max_json_depth)
            adapter = next((a for a in adapters if a.claims(body)), None)
            if adapter is None:
                raise InvalidRequest(f"{http.path}: the body belongs to no known dialect; see docs/api.md")
            return adapter, body, adapter.parse(body, info, http.match_info)

        return handle

    async def _read_body(self, http: web.Request) -> bytes:
        return await read_body(http, self._settings.max_request_bytes)

    def _ready_service(self) -> GenerationService:
        if self.service is None:
            raise ServiceUnavailable("the model is still loading; see /v2/health/live", retry_after_s=5)
        return self.service


async def _answer(
    http: web.Request,
    request_id: str,
    request: GenerationRequest,
    stream: GenerationStream,
    reply: Reply,
    tell: Callable[[], Breakdown] | None = None,
) -> web.StreamResponse:
    """`tell`: where the time went, when the client is to be told."""
    if not request.stream:
        body = await _written(reply.result, request, await stream.collect())
        return web.json_response(body=body, headers=server_timing(tell()) if tell else None)
    response = web.StreamResponse(headers=_STREAM_HEADERS)
    if request.sampling.beam_search:  # nothing is final before all beams have ended
        frames = await _written(reply.beam_frames, request, await stream.collect())
        await response.prepare(http)
        for frame in [*frames, *_tail(reply, tell)]:
            await response.write(frame)
        await response.write_eof()
        return response
    bound_backlog(http, stream)
    try:
        async for step in stream:
            if not response.prepared:  # not before the first token: until then an error is plain JSON
                await response.prepare(http)
            # one write is one HTTP chunk; clients of the original parse each chunk by itself
            if frame := reply.frame(step):
                await response.write(frame)
        for frame in _tail(reply, tell):
            await response.write(frame)
    except (asyncio.CancelledError, ConnectionError):
        if http.transport is not None:
            http.transport.abort()  # a client that does not read would keep what is buffered for it
        raise
    except Exception as error:
        if not response.prepared:
            raise
        if not isinstance(error, ServerError):
            log.exception("request %s failed after its first frame", request_id, extra=code(STREAM_FAILED))
            error = EngineFailed()
        error.request_id = request_id
        for frame in reply.error_frames(error):
            await response.write(frame)
    await response.write_eof()
    return response


def _tail(reply: Reply, tell: Callable[[], Breakdown] | None) -> Sequence[bytes]:
    """What follows the last step. A comment has no place among records that are no server-sent events."""
    return reply.tail() if tell is None or not reply.is_sse else [*reply.tail(), timing_comment(tell())]


async def _written(
    write: Callable[[Sequence[Completion]], T], request: GenerationRequest, completions: Sequence[Completion]
) -> T:
    """`write(completions)`, beside the event loop when there is much to write."""
    asked = request.sampling
    size = sum(
        len(one.token_ids) * (2 + asked.logprobs) + len(one.prompt) * (1 + asked.prompt_logprobs)
        for one in completions
    )
    return write(completions) if size < _INLINE_ENTRIES else await asyncio.to_thread(write, completions)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure becomes the canonical body; only our own texts reach a client."""
    request[_UUID] = new_uuid()
    audit_request(request, f"received {request[_UUID]}")
    try:
        return await handler(request)
    except ServerError as error:
        return _error_response(error, request[_UUID])
    except web.HTTPNotFound:
        return _error_response(http_errors.unknown_path(), request[_UUID])
    except web.HTTPMethodNotAllowed as error:
        allowed = tuple(sorted(error.allowed_methods))
        return _error_response(http_errors.wrong_method(allowed), request[_UUID])
    except web.HTTPException:
        raise
    except Exception as error:
        if isinstance(error, ConnectionError) and (not request.transport or request.transport.is_closing()):
            raise asyncio.CancelledError from None  # the client has gone: as when aiohttp notices it itself
        log.exception("request %s failed", request[_UUID], extra=code(REQUEST_FAILED))
        return _error_response(error, request[_UUID])


def _authorization(keys: ApiKeys) -> Middleware:
    """Denies by default: every path of every plane, known or not, needs a key where keys are configured."""

    @web.middleware
    async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in PUBLIC_PATHS:
            key = keys.authenticate(request.headers, request.remote or "unknown")
            if key is not None:
                request[_KEY] = key
        return await handler(request)

    return authorize


def _error_response(error: Exception, request_id: str) -> web.Response:
    return web.json_response(
        body=http_errors.error_body(error, request_id),
        status=http_errors.status(error),
        headers=http_errors.error_headers(error),
    )


async def _name_response(request: web.Request, response: web.StreamResponse) -> None:
    if isinstance(response, web.HTTPException):  # raised by aiohttp before our handlers, such as 417
        make_canonical(response)
    request_id = response.headers["RequestUUID"] = request.get(_UUID) or new_uuid()
    key: ApiKey | None = request.get(_KEY)
    audit_request(request, f"{response.status} {request_id}" + (f" key={key.name}" if key else ""))
    response.headers["Server"] = SERVER_NAME  # not which libraries in which versions


def _metrics_handler(metrics: Metrics, enabled: bool) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        if not enabled:
            raise EngineFailed("metrics are off: MIES_SERVICE_MONITOR_MODE is 0; unset it, or set it to 1")
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    return handle


def make_app(
    planes: Sequence[Plane],
    business: BusinessPlane,
    management: ManagementPlane,
    metrics: Metrics,
    settings: EndpointSettings,
    keys: ApiKeys,
    guard: ControlGuard | None = None,
) -> web.Application:
    """`guard`: of the listener; without one, control routes know the listener by its address alone."""
    app = web.Application(
        middlewares=[_errors, _authorization(keys)], client_max_size=settings.max_request_bytes
    )
    app.on_response_prepare.append(_name_response)
    if "business" in planes:
        app.add_routes(business.routes())
    if "management" in planes:
        app.add_routes((guard or ControlGuard()).protect(management.routes()))
    if "metrics" in planes:
        app.add_routes([web.get("/metrics", _metrics_handler(metrics, settings.metrics_enabled))])
    return app
