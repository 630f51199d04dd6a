"""Every route of every plane, as /openapi.json and /docs tell of it.

tests/endpoint/test_openapi.py compares this list with what the applications route.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from endpoint.answer_schemas import OF_ADAPTER
from endpoint.api_keys import PUBLIC_PATHS
from endpoint.declarations import Json, RequestBody
from endpoint.fault_handling import FAULT_BODY, FAULT_PATH
from endpoint.lora_api import LOAD_BODY, LOAD_PATH, UNLOAD_BODY, UNLOAD_PATH
from endpoint.protocols.base import ProtocolAdapter
from endpoint.protocols.triton import MODEL_PATH, STOP_INFER_BODY
from endpoint.token_count import COUNT_BODY
from engine.settings import Plane

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"
HTML = "text/html"

_PATTERN = re.compile(r"\{(\w+):[^}]*\}")


def template(path: str) -> str:
    """An aiohttp path without the patterns of its parameters."""
    return _PATTERN.sub(r"{\1}", path)


_MODEL = template(MODEL_PATH)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. Schemas are meant by their names; an empty body has none."""

    method: Literal["get", "post"]
    path: str
    plane: Plane
    family: str
    summary: str
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of 200, by content type
    errors: Mapping[int, str | None] = field(default_factory=dict)
    bodies: Mapping[str, RequestBody] = field(default_factory=dict)  # by the name of their schema
    query: tuple[Json, ...] = ()


def _errors(*statuses: int) -> dict[int, str | None]:
    return dict.fromkeys(statuses, "Error")


_GENERATION_ERRORS = (408, 413, 422, 424, 429, 500, 503)


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def generation_operations(adapters: Sequence[ProtocolAdapter]) -> list[Operation]:
    """Dialects that share a path share its operation."""
    by_path: dict[str, list[ProtocolAdapter]] = {}
    for adapter in adapters:
        for path in adapter.routes:
            by_path.setdefault(template(path), []).append(adapter)
    return [_generation(path, sharing) for path, sharing in by_path.items()]


def _generation(path: str, adapters: Sequence[ProtocolAdapter]) -> Operation:
    answers: dict[str, tuple[str, ...]] = {}
    for adapter in adapters:
        whole, frame = OF_ADAPTER.get(adapter.name, ("Object", None))
        for content_type, schema in ((JSON, whole), (EVENTS, frame)):
            if schema is not None:
                answers[content_type] = (*answers.get(content_type, ()), schema)
    return Operation(
        "post",
        path,
        "business",
        " and ".join(dict.fromkeys(adapter.family for adapter in adapters)),
        " / ".join(dict.fromkeys(adapter.body.meaning for adapter in adapters)),
        answers=answers,
        errors=_errors(*((404,) if "{model}" in path else ()), *_GENERATION_ERRORS),
        bodies={f"{_camel(adapter.name)}Request": adapter.body for adapter in adapters},
    )


def _get(path: str, plane: Plane, family: str, summary: str, answer: str = "", *errors: int) -> Operation:
    """`answer`: name of the schema of a JSON answer; without it the answer is empty."""
    answers = {JSON: (answer,)} if answer else {}
    return Operation("get", path, plane, family, summary, answers, _errors(*errors))


def _health(path: str, summary: str, message: str = "") -> Operation:
    """A check that says no more than its status, or a `message` beside it."""
    answers = {JSON: (message,)} if message else {}
    schema = message or None
    return Operation("get", path, "management", "Health", summary, answers, {500: schema, 503: schema})


def _post(
    path: str, plane: Plane, family: str, name: str, body: RequestBody, answer: str, *errors: int
) -> Operation:
    """`name`: of the body's schema."""
    every = sorted({*errors, 408, 413, 422, 500, 503})
    return Operation(
        "post", path, plane, family, body.meaning, {JSON: (answer,)}, _errors(*every), {name: body}
    )


_FORCE: Json = {
    "name": "mode",
    "description": "Force: ends after about five seconds, without waiting.",
    "schema": {"type": "string", "enum": ["Force"]},
}

FIXED: tuple[Operation, ...] = (
    _post("/v1/tokenizer", "business", "MindIE", "TokenizerRequest", COUNT_BODY, "TokenCount", 429),
    _post(
        f"{_MODEL}/stopInfer",
        "business",
        "MindIE",
        "StopInferRequest",
        STOP_INFER_BODY,
        "StopInferAnswer",
        404,
    ),
    _get("/v1/models", "business", "OpenAI", "The served model and its adapters.", "ModelList", 503),
    _get("/v1/models/{model}", "business", "OpenAI", "One served model.", "Model", 404, 503),
    _get("/v2", "business", "Triton", "The server and its limits.", "ServerMetadata"),
    _get(_MODEL, "business", "Triton", "Tensors of the model.", "ModelMetadata", 404, 503),
    _get(f"{_MODEL}/config", "business", "Triton", "Settings of the model.", "ModelConfig", 404, 503),
    _get("/dresult", "business", "Cluster", "Results of another server's prefill: never any here.", "", 400),
    _health("/v2/health/live", "Whether the process lives; a message while the model loads.", "Message"),
    _health("/v2/health/ready", "Whether requests are taken now.", "Message"),
    _health("/health", "Whether the service is well."),
    replace(
        _health(f"{_MODEL}/ready", "Whether the model can be asked."),
        errors={404: "Error", 500: None, 503: None},
    ),
    _get("/health/timed", "management", "Health", "Tries one token, for 10 seconds.", "Healthy", 500, 503),
    _get("/health/timed-{seconds}", "management", "Health", "Tries one token.", "Healthy", 404, 500, 503),
    _get("/info", "management", "TGI", "The served model and its limits.", "Info", 503),
    _get(f"{_MODEL}/getSlotCount", "management", "MindIE", "Free slots and cache.", "SlotCount", 404, 503),
    _get("/v1/config", "management", "MindIE", "Settings of the server.", "ServerConfig", 503),
    _get("/v1/status", "management", "MindIE", "Load of the server.", "Status", 503),
    _get("/v2/status", "management", "MindIE", "Load of the server, with totals.", "StatusV2", 503),
    _get(
        "/v1/engine-server/running-status", "management", "Cluster", "State of the engine.", "RunningStatus"
    ),
    _post(FAULT_PATH, "management", "Cluster", "FaultHandlingRequest", FAULT_BODY, "FaultHandling", 400),
    _get("/metrics-json", "management", "MindIE", "Averages, and the load now.", "MetricsVector"),
    _post(LOAD_PATH, "management", "MindIE", "LoadLoraRequest", LOAD_BODY, "Message", 400, 403),
    _post(UNLOAD_PATH, "management", "MindIE", "UnloadLoraRequest", UNLOAD_BODY, "Message", 400, 403, 404),
    _get("/openapi.json", "management", "Documents", "This interface in OpenAPI 3.1.", "Object"),
    replace(
        _get("/docs", "management", "Documents", "This interface as a page to read."),
        answers={HTML: ("Text",)},
    ),
    replace(
        _get("/metrics", "metrics", "Prometheus", "Counters, gauges and histograms.", "", 500),
        answers={TEXT: ("Text",)},
    ),
    replace(
        _get(
            "/stopService",
            "management",
            "Stopping",
            "Refuses new requests, waits for the others, answers, and ends the whole service.",
            "",
            403,
            422,
            500,
        ),
        query=(_FORCE,),
    ),
)


def operations(adapters: Sequence[ProtocolAdapter]) -> list[Operation]:
    return [_guarded(operation) for operation in (*generation_operations(adapters), *FIXED)]


def _guarded(operation: Operation) -> Operation:
    """With the answer to a request without an API key, where it needs one."""
    if operation.path in PUBLIC_PATHS:
        return operation
    return replace(operation, errors={**operation.errors, 401: "Error"})
