"""Control routes answer people and programs, never a web page of somebody else's (reliability.md A22).

A page may make its visitor's browser call addresses that only the visitor can reach. What it cannot hide is
where it comes from: `Origin`, `Sec-Fetch-Site`, and the name it was loaded under, which stands in `Host` even
when that name has been pointed at our address meanwhile.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection, Iterable
from urllib.parse import urlsplit

from aiohttp import web

from endpoint.validation import show
from engine.errors import ForeignOrigin

_READING = ("GET", "HEAD")
_CHANGING_GETS = ("/stopService",)
_OWN_SITES = ("same-origin", "none")  # none: typed into the address bar

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlGuard:
    """Of one listener."""

    def __init__(
        self,
        certificate_names: Callable[[], Collection[str]] = frozenset,
        allowed_hosts: Iterable[str] = (),
    ) -> None:
        """`allowed_hosts`: names under which a reverse proxy passes requests on."""
        self._certificate_names = certificate_names
        self._allowed = {_host_name(host) for host in allowed_hosts}

    def protect(self, routes: Iterable[web.RouteDef]) -> list[web.RouteDef]:
        """The same routes; those that change something refuse what a foreign page has sent.

        A GET that changes something is for GET alone: aiohttp would call its handler for HEAD as well.
        """
        return [self._protected(route) for route in routes]

    def _protected(self, route: web.RouteDef) -> web.RouteDef:
        if route.method in _READING and route.path not in _CHANGING_GETS:
            return route
        kwargs = {**route.kwargs, "allow_head": False} if route.method == "GET" else route.kwargs
        return web.RouteDef(route.method, route.path, self._guarded(route.handler), kwargs)

    def check(self, request: web.Request) -> None:
        """Raises ForeignOrigin."""
        host = request.headers.get("Host", "")  # HTTP/1.0 alone may have none, and no browser speaks it
        if host and not self._is_ours(_host_name(host), _own_address(request)):
            raise ForeignOrigin(
                f"`Host` is {show(host)}, which is no name of this listener; use its address, a name in its "
                "certificate, or add the name to the config key runtimeConfig.allowedHosts"
            )
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site not in _OWN_SITES:
            raise ForeignOrigin(
                f"`Sec-Fetch-Site` is {show(site)}: control routes take nothing from pages of other sites; "
                "send the request with a client such as curl"
            )
        for origin in request.headers.getall("Origin", []):
            if not host or urlsplit(origin).netloc.lower() != host.lower():
                raise ForeignOrigin(
                    f"`Origin` is {show(origin)}: control routes take nothing from pages of other origins; "
                    "send the request with a client such as curl"
                )

    def _is_ours(self, name: str, own_address: str) -> bool:
        if name == own_address or name in self._allowed:
            return True
        if name == "localhost":
            return ipaddress.ip_address(own_address).is_loopback
        names = self._certificate_names()
        return name in names or f"*.{name.partition('.')[2]}" in names

    def _guarded(self, handler: _Handler) -> _Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.check(request)
            return await handler(request)

        return handle


def _host_name(host: str) -> str:
    """Name or address in a `Host` header, without port and brackets, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return _plain_address(host[1:].partition("]")[0])
    return _plain_address(host) if host.count(":") > 1 else host.partition(":")[0].rstrip(".")


def _own_address(request: web.Request) -> str:
    """Where the connection came in; it says more than a listener's 0.0.0.0."""
    assert request.transport is not None
    return _plain_address(request.transport.get_extra_info("sockname")[0])


def _plain_address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
