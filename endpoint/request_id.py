"""The name of a request inside this server: in its log, and for stopInfer."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

HEADER = "req-id"  # what schedulers before us call the request
_LEGAL = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def new_uuid() -> str:
    """What the answer's RequestUUID header says."""
    return secrets.token_hex(16)


def internal_id(headers: Mapping[str, str], uuid: str) -> str:
    """The client's own name for the request when it is a legal one, else ours: it ends up in log lines."""
    wanted = headers.get(HEADER, "")
    return wanted if _LEGAL.fullmatch(wanted) else uuid
