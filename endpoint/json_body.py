"""Request bodies: bytes that may be hostile in, one JSON object out.

The shape of a body is measured before it is parsed, with operations that run at C speed over the whole
body, so that a body built to be expensive costs no more than an honest one of its size.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.errors import InvalidRequest

MIN_DEPTH_LIMIT = 64  # tool schemas of real clients are deeper than smaller configured limits
MAX_NODES = 1_000_000

_BRACKETS_AND_COMMAS = b"[]{},"
_OTHER_BYTES = bytes(byte for byte in range(256) if byte not in _BRACKETS_AND_COMMAS)
_STRING = re.compile(rb'"[^"]*"?')  # of a body without escapes
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_OPENING = b"[{"


class _Refused(ValueError):
    """Raised by the parser's hooks; the text may be shown to the client."""


def parse_body(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Parse one request body.

    `max_depth`: configured nesting limit; limits below 64 count as 64.
    Raises InvalidRequest with a text that never repeats anything of the body.
    """
    if not raw:
        raise InvalidRequest("the request body is empty; send one JSON object")
    _check_shape(raw, max(max_depth, MIN_DEPTH_LIMIT))
    try:
        # decoded here because json.loads would also accept UTF-16 and UTF-32 bytes
        body = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_unique_members, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not UTF-8 at byte {error.start}; encode it so") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the request body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except _Refused as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from None
    except ValueError:  # the interpreter's limit on the digits of an integer
        raise InvalidRequest("the request body holds a number with too many digits") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the request body is JSON, but not an object; send one object {...}")
    if _SURROGATE_ESCAPE.search(raw):
        _check_surrogates(body)
    return body


def _check_shape(raw: bytes, max_depth: int) -> None:
    """Refuse bodies nested too deeply or with too many values, without recursion."""
    opening = raw.count(b"[") + raw.count(b"{")
    if opening <= max_depth and opening + raw.count(b",") < MAX_NODES:
        return
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    if unescaped.count(b'"') > 4 * MAX_NODES:  # a value and a member name, two quotes each
        raise _too_many_nodes()
    skeleton = _STRING.sub(b"", unescaped).translate(None, _OTHER_BYTES)
    if skeleton.count(b"[") + skeleton.count(b"{") + skeleton.count(b",") >= MAX_NODES:
        raise _too_many_nodes()
    depth = 0
    for byte in skeleton.replace(b",", b""):
        if byte in _OPENING:
            depth += 1
            if depth > max_depth:
                raise InvalidRequest(f"the request body is nested deeper than {max_depth} levels; flatten it")
        else:
            depth -= 1


def _too_many_nodes() -> InvalidRequest:
    return InvalidRequest(f"the request body holds more than {MAX_NODES} JSON values; send a smaller one")


def _unique_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(members)
    if len(unique) != len(members):
        raise _Refused("an object has the same member name twice")
    return unique


def _refuse_constant(name: str) -> None:
    raise _Refused(f"{name} is no JSON number")


def _check_surrogates(body: dict[str, Any]) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            "the request body holds half of a surrogate pair (\\ud800 to \\udfff); send whole characters"
        ) from None
