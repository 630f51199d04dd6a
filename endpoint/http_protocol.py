"""aiohttp's protocol with what it has no option for: deadlines of heads, places in a pool, our own errors.

aiohttp answers what is no HTTP request by itself, in plain text that quotes the bytes and names its version;
here it gets the canonical error object, as everything else does.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Protocol

from aiohttp import StreamReader, web

from endpoint import http_errors
from endpoint.audit import peer
from endpoint.connections import ConnectionPool
from endpoint.metadata import SERVER_NAME
from endpoint.quiet_log import QuietLog
from endpoint.request_id import new_uuid
from engine.errors import EngineFailed, MalformedRequest, ServerError, SlowRequest
from engine.logs.room import audit

_quiet = QuietLog(logging.getLogger("server.http"))


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


def last_answer(error: ServerError) -> bytes:
    """A whole answer for a connection on which no request was read; it says that the connection ends."""
    status, body = http_errors.status(error), http_errors.error_body(error)
    headers = {
        "Server": SERVER_NAME,
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **http_errors.error_headers(error),
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


_SLOW_HEAD = last_answer(
    SlowRequest(
        "the head of the request did not arrive in time (config key runtimeConfig.headTimeoutSec); "
        "send it at once"
    )
)


class Backlog(Protocol):
    def unread_bytes(self) -> int:
        """What has been made of an answer and is not written yet."""


class HttpProtocol(web.RequestHandler):
    """One connection. It has to be entered into a pool, and opened by the task given to `enter`."""

    __slots__ = ("_abort", "_body", "_head_has_begun", "_pool", "backlog")

    def enter(self, pool: ConnectionPool, opening: asyncio.Task[None]) -> None:
        """`opening`: accepts it, TLS handshake included; cancelled when it has to give way meanwhile."""
        self._pool = pool
        self._abort: Callable[[], object] = opening.cancel
        self._body: StreamReader | None = None  # of the request that is handled
        self._head_has_begun = False
        self.backlog: Backlog | None = None  # of the answer that is written
        pool.add(self)

    def abort(self) -> None:
        self._abort()

    def end_slow_head(self) -> None:
        if self._head_has_begun and self.transport is not None:
            self.transport.write(_SLOW_HEAD)
            self.force_close()
        else:
            self._abort()  # nobody waits for an answer, and TLS would wait for the other's farewell

    def end_slow_body(self) -> bool:
        if self._body is None or self._body.is_eof():
            return False
        self._body.set_exception(
            SlowRequest(
                "the body of the request did not arrive in time (config key runtimeConfig.bodyTimeoutSec); "
                "send it faster, or a smaller one"
            )
        )
        self._lingering_time = 0.0  # it has had its time
        return True

    def backlog_bytes(self) -> int:
        return self.backlog.unread_bytes() if self.backlog is not None else 0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pool.writing_stops(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._pool.writing_goes_on(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        self._abort = transport.abort
        self._pool.head_begins(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._pool.remove(self)
        if isinstance(exc, OSError) and exc.errno == errno.ETIMEDOUT:  # TCP_USER_TIMEOUT, see acceptor.py
            self._pool.metrics.closed(self._pool.plane, "stalled")

    def data_received(self, data: bytes) -> None:
        complete = self._request_count
        super().data_received(data)
        if self._request_count != complete:
            self._head_has_begun = False
            self._pool.request_begins(self)
        elif data:
            self._head_has_begun = True  # or it is of a body; then nobody asks
            self._pool.head_begins(self)

    async def _handle_request(
        self,
        request: web.BaseRequest,
        start_time: float | None,
        request_handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> tuple[web.StreamResponse, bool]:
        if not request.content.is_eof():
            self._body = request.content
            self._pool.body_begins(self)
        try:
            return await super()._handle_request(request, start_time, request_handler)
        finally:
            if self._body is not None:
                self._body = None
                self._pool.body_ends(self)
            self._head_has_begun = False
            self.backlog = None
            if not self._messages:  # what was sent ahead is handled next
                self._pool.request_ends(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Raises ConnectionError, as the base does, when an answer has already begun."""
        error: ServerError
        if status >= 500:
            super().handle_error(request, status, exc, message)  # logs; its answer is not sent
            error = EngineFailed()
        else:
            _quiet.warning("malformed", f"malformed request: {type(exc).__name__}")  # without a byte of it
            if request.writer.output_size > 0:
                raise ConnectionError("an answer has begun")
            error = _malformed()
        request_id = new_uuid()
        response = web.json_response(
            body=http_errors.error_body(error, request_id),
            status=http_errors.status(error),
            headers={"Server": SERVER_NAME, "RequestUUID": request_id},
        )
        audit(peer(request), "malformed request", f"{response.status} {request_id}")
        response.force_close()
        return response


def bound_backlog(request: web.Request, backlog: Backlog) -> None:
    """End the connection when the backlog grows beyond measure while the client does not read its answer."""
    if isinstance(request.protocol, HttpProtocol):
        request.protocol.backlog = backlog


class _Server(web.Server):
    def __call__(self) -> HttpProtocol:
        return HttpProtocol(self, loop=self._loop, **self._kwargs)


class AppRunner(web.AppRunner):
    """aiohttp's, which has no option for the class of its protocols."""

    def new_protocol(self) -> HttpProtocol:
        """For one connection. To be called after `setup`."""
        assert isinstance(self.server, _Server)
        return self.server()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server
