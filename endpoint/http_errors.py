"""How every error looks over HTTP: the only place with status numbers."""

from __future__ import annotations

from endpoint import sse
from engine.errors import (
    BodyTooLarge,
    EngineFailed,
    ForeignOrigin,
    GenerationRefused,
    GrammarFailed,
    InvalidRequest,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    QuotaExceeded,
    RequestTimeout,
    ServerError,
    ServiceUnavailable,
    SlowRequest,
    Unauthorized,
    WrongState,
)

# status and error class, as clients see them
STATUS: dict[type[ServerError], tuple[int, str]] = {
    ServerError: (500, "Incomplete Generation"),
    InvalidRequest: (422, "Input Validation Error"),
    NotFound: (404, "NotFoundError"),
    MethodNotAllowed: (405, "Method Not Allowed"),
    BodyTooLarge: (413, "Request Entity Too Large"),
    GenerationRefused: (424, "Generation Error"),
    GrammarFailed: (424, "Generation Error"),
    RequestTimeout: (500, "Incomplete Generation"),
    EngineFailed: (500, "Incomplete Generation"),
    ServiceUnavailable: (503, "Service Unavailable"),
    WrongState: (400, "Bad Request"),
    MalformedRequest: (400, "Bad Request"),
    ForeignOrigin: (403, "Forbidden"),
    SlowRequest: (408, "Request Timeout"),
    Unauthorized: (401, "Unauthorized"),
    QuotaExceeded: (429, "Too Many Requests"),
}

_INTERNAL = (
    "the server failed while handling this request; the server log has the details under its RequestUUID"
)


def _row(error: BaseException) -> tuple[int, str]:
    for base in type(error).__mro__:
        if base in STATUS:
            return STATUS[base]
    return STATUS[ServerError]


def status(error: BaseException) -> int:
    """HTTP status of `error`; 500 for anything that is no ServerError."""
    return _row(error)[0]


def error_text(error: BaseException, request_id: str = "") -> str:
    """The error object as JSON on one line; nothing of an unexpected exception's own text gets out.

    `request_id`: RequestUUID, by which the log tells more; `error` may carry it instead.
    """
    text = str(error) if isinstance(error, ServerError) else ""
    text = text or _INTERNAL
    name = _row(error)[1]
    body = {"error": text, "error_type": name, "type": name}
    if isinstance(error, BodyTooLarge):
        body = {"message": text, **body}
    if not request_id and isinstance(error, ServerError):
        request_id = error.request_id
    if request_id:
        body["request_id"] = request_id
    return sse.dumps(body)


def error_body(error: BaseException, request_id: str = "") -> bytes:
    """JSON body of the answer to a request that failed."""
    return error_text(error, request_id).encode()


def error_headers(error: BaseException) -> dict[str, str]:
    """Headers the status asks for, besides those of every JSON answer."""
    if isinstance(error, MethodNotAllowed):
        return {"Allow": ", ".join(error.allowed)}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, ServiceUnavailable | QuotaExceeded) and error.retry_after_s is not None:
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, SlowRequest):
        return {"Connection": "close"}  # where the next request would begin is not known
    return {}


def body_too_large(max_request_bytes: int) -> BodyTooLarge:
    """`max_request_bytes`: the limit, a whole number of MiB."""
    return BodyTooLarge(f"Request body too large. Maximum allowed size is {max_request_bytes >> 20}MB.")


def unknown_path() -> NotFound:
    # the path itself stays out of the text: it is the client's bytes, unchecked
    return NotFound("there is no such path on this address; see the list of routes in the documentation")


def wrong_method(allowed: tuple[str, ...]) -> MethodNotAllowed:
    return MethodNotAllowed(f"this path does not take the method used; send {' or '.join(allowed)}", allowed)
