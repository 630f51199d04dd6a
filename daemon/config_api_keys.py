"""runtimeConfig.apiKeys: who may use the server, and how much of it. No finding shows a key or its hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from daemon.config_report import Report
from daemon.config_schema import I32_MAX, RUNTIME, Key
from daemon.config_values import Values
from engine.settings import ApiKeySettings

PATH = f"{RUNTIME}.apiKeys"
_NAME = Key(
    "name", "string", pattern=r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}",
    allowed="1 to 64 of A-Z a-z 0-9 _ . -, first a letter or digit",
)  # fmt: skip
_LIMITS = (
    Key("maxRunning", "int", 0, 0, 4096),
    Key("maxQueued", "int", 0, 0, 8192),
    Key("tokensPerMinute", "int", 0, 0, I32_MAX),
)
_HASH = "64 hex digits, the SHA-256 of the key; scripts/make_api_key.py makes both"
_MEMBERS = (_NAME.name, "sha256", *(key.name for key in _LIMITS))


def read_api_keys(values: Values, report: Report) -> tuple[ApiKeySettings, ...]:
    """Everything wrong with the keys becomes a finding."""
    if not values.has(PATH):
        return ()
    found = []
    names: dict[str, str] = {}  # name -> where it was given first
    hashes: dict[bytes, str] = {}
    for index, item in enumerate(values.raw(PATH)):
        path = f"{PATH}[{index}]"
        key = _read_one(path, item, report)
        if key is None:
            continue
        found.append(key)
        if (first := names.setdefault(key.name, path)) != path:
            report.refuse(f"{path}.name", key.name, f"is the name of {first} already", "a name of its own")
        if (first := hashes.setdefault(key.sha256, path)) != path:
            report.refuse_secret(f"{path}.sha256", f"is the hash of {first} already", "a key of its own")
    return tuple(found)


def _read_one(path: str, item: Mapping[str, Any], report: Report) -> ApiKeySettings | None:
    before = len(report.findings)
    for name in item:
        if name not in _MEMBERS:
            report.refuse_secret(f"{path}.{name}", "unknown key", ", ".join(_MEMBERS))
    for key in (_NAME, *_LIMITS):
        if key.name in item and (fault := key.fault(item[key.name])):
            if isinstance(item[key.name], int):
                report.refuse(f"{path}.{key.name}", item[key.name], fault, key.permitted())
            else:
                report.refuse_secret(f"{path}.{key.name}", fault, key.permitted())
    if _NAME.name not in item:
        report.absent(f"{path}.name", _NAME.permitted())
    if "sha256" not in item:
        report.absent(f"{path}.sha256", _HASH)
    elif not isinstance(item["sha256"], str) or not re.fullmatch("[0-9A-Fa-f]{64}", item["sha256"]):
        report.refuse_secret(f"{path}.sha256", "no SHA-256 in hex digits", _HASH)
    if len(report.findings) > before:
        return None
    return ApiKeySettings(
        item["name"], bytes.fromhex(item["sha256"]), *(item.get(key.name, key.default) for key in _LIMITS)
    )
