"""Answers to what is no HTTP request, before there is a path: the canonical error object, as everywhere else.

aiohttp answers such bytes by itself, in plain text that quotes them and names its version.
"""

from __future__ import annotations

from aiohttp import web

from endpoint import http_errors
from endpoint.audit import peer
from endpoint.metadata import SERVER_NAME
from endpoint.request_id import new_uuid
from engine.errors import EngineFailed, MalformedRequest, ServerError
from engine.logs.room import audit


def _malformed() -> MalformedRequest:
    # what exactly was wrong stays out of the text: it is the client's bytes, unchecked
    return MalformedRequest(
        "the HTTP request is malformed, too large in its head, or expects what this server does not do; "
        "send plain HTTP/1.1 with a head of at most 8190 bytes a line"
    )


def make_canonical(response: web.HTTPException) -> None:
    """Replace aiohttp's text by the error object; the status stays."""
    body = http_errors.error_body(_malformed())
    response.content_type = "application/json"
    response.body = body
    response.headers["Content-Length"] = str(len(body))  # of the text it was made with


class _Protocol(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Raises ConnectionError, as the base does, when an answer has already begun."""
        super().handle_error(request, status, exc, message)  # logs; its answer is not sent
        error: ServerError = EngineFailed() if status >= 500 else _malformed()
        request_id = new_uuid()
        response = web.json_response(
            body=http_errors.error_body(error, request_id),
            status=http_errors.status(error),
            headers={"Server": SERVER_NAME, "RequestUUID": request_id},
        )
        audit(peer(request), "malformed request", f"{response.status} {request_id}")
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        protocol = super().__call__()
        protocol.__class__ = _Protocol
        return protocol


class AppRunner(web.AppRunner):
    """aiohttp's, but for malformed requests. It has no option for the class of its protocols."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server
