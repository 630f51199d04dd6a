"""Who asked for what: the lines of the audit log that HTTP makes."""

from __future__ import annotations

from urllib.parse import quote

from aiohttp import web

from engine.logs.room import audit

_LONGEST_METHOD, _LONGEST_PATH = 16, 100  # characters: enough to know what was tried, too few to fill a disk
_PLAIN = "/%{}:@!$&'()*+,;=-._~"  # beside letters and digits; brackets delimit the fields of a line


def audit_request(request: web.BaseRequest, result: str) -> None:
    """`result`: that it was received, or the status of its answer. Never the query, which is the client's."""
    method = plain(request.method, _LONGEST_METHOD)
    audit(peer(request), f"{method} {plain(request.rel_url.raw_path, _LONGEST_PATH)}", result)


def peer(request: web.BaseRequest) -> str:
    """ip:port of the client, "unknown" when it has gone."""
    name = request.transport.get_extra_info("peername") if request.transport is not None else None
    if not name:
        return "unknown"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def plain(text: str, longest: int) -> str:
    """Printable ASCII, everything else as %xx, brackets and blanks included; cut off where it is longer."""
    quoted = quote(text[:longest], safe=_PLAIN, errors="surrogateescape")
    if max(len(text), len(quoted)) <= longest:
        return quoted
    return f"{quoted[:longest]}...({len(text)} characters)"
