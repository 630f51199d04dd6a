"""Who asked for what: the lines of the audit log that HTTP makes."""

from __future__ import annotations

from aiohttp import web

from engine.logs.room import audit


def audit_request(request: web.BaseRequest, result: str) -> None:
    """`result`: that it was received, or the status of its answer. Never the query, which is the client's."""
    audit(peer(request), f"{request.method} {request.rel_url.raw_path}", result)


def peer(request: web.BaseRequest) -> str:
    """ip:port of the client, "unknown" when it has gone."""
    name = request.transport.get_extra_info("peername") if request.transport is not None else None
    if not name:
        return "unknown"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
