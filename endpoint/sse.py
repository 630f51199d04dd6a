"""Server-sent events: one JSON object on one `data:` line, then a blank line."""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from typing import Any

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def _one_line(text: str) -> str:
    # JSON leaves these three as they are, but line readers built on str.splitlines break a frame at them
    if text.isascii():
        return text
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def json_text(text: str) -> str:
    """`text` as a JSON string literal without line breaks."""
    return _one_line(encode_basestring(text))


def dumps(value: Any) -> str:
    """Compact JSON on one line; characters outside ASCII stay readable."""
    return _one_line(_encode(value))


def frame(body: str) -> bytes:
    """One frame around `body`, which is JSON on one line."""
    return f"data: {body}\n\n".encode()
