"""The OpenAPI 3.1 document, made of the list of routes and the declarations by which requests are read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from endpoint.answer_schemas import SCHEMAS, ref
from endpoint.api_keys import HEADERS, PUBLIC_PATHS
from endpoint.declarations import Json
from endpoint.metadata import SERVER_NAME, SERVER_VERSION
from endpoint.operations import EVENTS, Operation, operations
from endpoint.protocols.base import ProtocolAdapter
from engine.settings import Listener, Plane

ERROR_MEANINGS: dict[int, str] = {
    400: "not possible in the present state of the server",
    401: "API keys are configured, and the request has none of them",
    403: "a control request from a page of another origin, or under a host name that is not this server's",
    404: "no such model, request or path",
    405: "the path does not take this method",
    408: "the head or the body did not arrive in time",
    413: "the body is larger than maxRequestLength of the configuration",
    422: "not JSON; a field missing, of the wrong type or out of range; fields that exclude each other",
    424: "well formed, but refused by the engine: prompt too long, token id outside the vocabulary",
    429: "a limit of the API key is reached: Retry-After says when to try again",
    500: "the engine failed, or made no token in time",
    503: "not ready yet, stopping, or too many requests: Retry-After says when to try again",
}

_PLANES: dict[Plane, str] = {
    "business": "Inference, models and token counts.",
    "management": "Health, state, configuration, stop, documents.",
    "metrics": "Prometheus.",
}
_DEFAULT_SERVERS: dict[Plane, str] = {
    "business": "http://127.0.0.1:1025",
    "management": "http://127.0.0.2:1026",
    "metrics": "http://127.0.0.2:1027",
}
_PARAMETERS: dict[str, Json] = {
    "model": {
        "description": "name of the served model",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]+$"},
    },
    "seconds": {
        "description": "longest wait in seconds",
        "schema": {"type": "integer", "minimum": 1, "maximum": 600},
    },
}
# where the configuration has keys; the empty one: where it has none
_SECURITY: list[Json] = [{}, {"bearer": []}, *({name: []} for name in HEADERS)]
_SECURITY_SCHEMES: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    **{name: {"type": "apiKey", "in": "header", "name": name} for name in HEADERS},
}
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")
_OWN_SCHEMAS: dict[str, Json] = {"Object": {"type": "object"}, "Text": {"type": "string"}}
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def openapi_document(
    adapters: Sequence[ProtocolAdapter], model_name: str, listeners: Sequence[Listener] = ()
) -> Json:
    """`model_name`: what the examples ask for. Without `listeners` the stock configuration's addresses."""
    servers = {**_DEFAULT_SERVERS, **_addresses(listeners)}
    listed = operations(adapters)
    paths: Json = {}
    for operation in listed:
        item = paths.setdefault(operation.path, {"servers": [{"url": servers[operation.plane]}]})
        item[operation.method] = _operation(operation, model_name)
    bodies = {name: body.schema() for operation in listed for name, body in operation.bodies.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": SERVER_NAME,
            "version": SERVER_VERSION,
            "description": "Unknown members of a body are ignored, and null is the same as not sent. "
            "Every error has the same body.",
        },
        "servers": [{"url": servers["business"]}],
        "tags": [{"name": plane, "description": meaning} for plane, meaning in _PLANES.items()],
        "paths": paths,
        "security": _SECURITY,
        "components": {
            "securitySchemes": _SECURITY_SCHEMES,
            "schemas": {**bodies, **SCHEMAS, **_OWN_SCHEMAS},
            "responses": {f"Error{status}": _refusal(status, "Error") for status in ERROR_MEANINGS},
        },
    }


def _addresses(listeners: Sequence[Listener]) -> dict[Plane, str]:
    urls: dict[Plane, str] = {}
    for listener in listeners:
        host = _ANY_ADDRESS.get(listener.address, listener.address)
        host = f"[{host}]" if ":" in host else host
        scheme = "http" if listener.tls is None else "https"
        urls.update(dict.fromkeys(listener.planes, f"{scheme}://{host}:{listener.port}"))
    return urls


def _operation(operation: Operation, model_name: str) -> Json:
    described: Json = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method} {operation.path}").strip("_"),
        "tags": [operation.plane],
        "x-family": operation.family,
        "summary": operation.summary,
    }
    in_path = [
        {"name": name, "in": "path", "required": True, **_PARAMETERS[name]}
        for name in _PATH_PARAMETER.findall(operation.path)
    ]
    in_query = [{"in": "query", "required": False, **parameter} for parameter in operation.query]
    if parameters := [*in_path, *in_query]:
        described["parameters"] = parameters
    if operation.path in PUBLIC_PATHS:
        described["security"] = []
    if operation.bodies:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": _request(operation, model_name)},
        }
    described["responses"] = _responses(operation)
    return described


def _request(operation: Operation, model_name: str) -> Json:
    examples: Json = {}
    for name, body in operation.bodies.items():
        for title, example in body.examples.items():
            value = {**example, "model": model_name} if "model" in example else example
            shared = len(operation.bodies) > 1
            examples[f"{name.removesuffix('Request')}: {title}" if shared else title] = {"value": value}
    return {"schema": _any_of([ref(name) for name in operation.bodies]), "examples": examples}


def _responses(operation: Operation) -> Json:
    answer: Json = {"description": "the answer"}
    if operation.answers:
        answer["content"] = {
            content_type: _content(content_type, names) for content_type, names in operation.answers.items()
        }
    # what has no other way than to refuse has no 200
    responses = {} if operation.errors.keys() == {400, 401} else {"200": answer}
    for status, schema in operation.errors.items():
        shared = {"$ref": f"#/components/responses/Error{status}"}
        responses[str(status)] = shared if schema == "Error" else _refusal(status, schema)
    return responses


def _refusal(status: int, schema: str | None) -> Json:
    refusal: Json = {"description": ERROR_MEANINGS[status]}
    if schema is not None:
        refusal["content"] = {"application/json": {"schema": ref(schema)}}
    return refusal


def _content(content_type: str, names: Sequence[str]) -> Json:
    if content_type == EVENTS:
        frames = " or ".join(names)
        return {
            "schema": {"type": "string", "description": f"one {frames} per frame"},
            "x-frames": list(names),
        }
    return {"schema": _any_of([ref(name) for name in names])}


def _any_of(schemas: list[Json]) -> Json:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
