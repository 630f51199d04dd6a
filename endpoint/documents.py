"""GET /openapi.json and GET /docs: there as soon as the management plane is, whatever the model does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from aiohttp import web

from endpoint import sse
from endpoint.declarations import Json
from endpoint.docs_page import render
from endpoint.openapi import openapi_document
from endpoint.protocols.registry import load_adapters
from engine.settings import Listener

# the page has no script and fetches nothing: a browser need not allow more
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class Documents:
    """Both are made when first asked for, then kept."""

    def __init__(self, listeners: Sequence[Listener], model_name: str) -> None:
        """`model_name`: what the examples ask for."""
        self._listeners = listeners
        self._model_name = model_name

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/openapi.json", self._openapi), web.get("/docs", self._docs)]

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(body=self._json)

    async def _docs(self, request: web.Request) -> web.Response:
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=_PAGE_HEADERS)

    @cached_property
    def _document(self) -> Json:
        return openapi_document(load_adapters(), self._model_name, self._listeners)

    @cached_property
    def _json(self) -> bytes:
        return sse.dumps(self._document).encode()

    @cached_property
    def _page(self) -> bytes:
        return render(self._document, self._model_name).encode()
