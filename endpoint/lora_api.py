"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter of the management plane."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import NamedTuple

from aiohttp import web

from endpoint.adapters import AdapterRegistry
from endpoint.declarations import Json, Special, request_body
from endpoint.json_body import parse_body
from endpoint.protocols.base import Body
from endpoint.request_body import read_body
from endpoint.validation import Fields, show
from engine.settings import EndpointSettings, ModelSettings

LOAD_PATH = "/v1/load_lora_adapter"
UNLOAD_PATH = "/v1/unload_lora_adapter"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,256}")
_RESERVED = "None"  # stands for the base model in the dialects that have an optional model
_MAX_PATH = 4096
_NAME_JSON: Json = {"type": "string", "pattern": f"^{_NAME.pattern}$"}
_PATH_JSON: Json = {"type": "string", "minLength": 1, "maxLength": _MAX_PATH}


class Load(NamedTuple):
    name: str
    path: Path  # absolute


def _read_name(fields: Fields) -> str:
    value = fields.raw("lora_name")
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value == _RESERVED:
        raise fields.error("lora_name", '1 to 256 letters, digits, `_` or `-`, and not "None"', "correct it")
    return value


def _read_path(fields: Fields, root: Path) -> Path:
    """`root`: what a relative path is relative to."""
    value = fields.raw("lora_path")
    wanted = f"a path of 1 to {_MAX_PATH} characters without `..`"
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_PATH or "\0" in value:
        raise fields.error("lora_path", wanted, "send the directory of the adapter")
    if ".." in PurePath(value).parts:
        raise fields.error("lora_path", wanted, "write out where it leads")
    return Path(os.path.normpath(root / value))


def _check_master(fields: Fields, base: str) -> None:
    if fields.raw("master_model") not in (None, base):
        raise fields.error("master_model", f"{show(base)}, the served model")


_LORA_NAME = Special("lora_name", "What requests call the adapter.", _read_name, _NAME_JSON, required=True)
_LORA_PATH = Special(
    "lora_path",
    "Its directory on the server, with adapter_config.json and adapter_model.safetensors.",
    _read_path,
    _PATH_JSON,
    required=True,
)
_MASTER_MODEL = Special(
    "master_model", "The base model, which can only be the served one.", _check_master, {"type": "string"}
)
LOAD_BODY = request_body(
    "Load a LoRA adapter.",
    _LORA_NAME,
    _LORA_PATH,
    _MASTER_MODEL,
    examples={"load": {"lora_name": "my-adapter", "lora_path": "/data/adapters/my-adapter"}},
)
UNLOAD_BODY = request_body(
    "Unload a LoRA adapter, once the requests that use it have ended.",
    _LORA_NAME,
    examples={"unload": {"lora_name": "my-adapter"}},
)


def parse_load(body: Body, base: str, root: Path) -> Load:
    """Raises InvalidRequest."""
    fields = Fields(body)
    name, path = _LORA_NAME.read(fields), _LORA_PATH.read(fields, root)
    _MASTER_MODEL.read(fields, base)
    return Load(name, path)


def parse_unload(body: Body) -> str:
    """The adapter's name. Raises InvalidRequest."""
    return _LORA_NAME.read(Fields(body))


class LoraApi:
    """The two routes."""

    def __init__(
        self, settings: EndpointSettings, model: ModelSettings, registry: Callable[[], AdapterRegistry]
    ) -> None:
        """`registry` raises ServiceUnavailable while the service does not serve."""
        self._settings = settings
        self._model = model
        self._registry = registry

    def routes(self) -> list[web.RouteDef]:
        return [web.post(LOAD_PATH, self._load), web.post(UNLOAD_PATH, self._unload)]

    async def _load(self, request: web.Request) -> web.Response:
        registry = self._registry()
        asked = parse_load(await self._body(request), self._model.name, self._model.lora.root)
        await registry.load(asked.name, asked.path)
        return web.json_response({"message": f"adapter {asked.name} is loaded"})

    async def _unload(self, request: web.Request) -> web.Response:
        registry = self._registry()
        name = parse_unload(await self._body(request))
        await registry.unload(name)
        return web.json_response({"message": f"adapter {name} is unloaded"})

    async def _body(self, request: web.Request) -> Body:
        raw = await read_body(request, self._settings.max_request_bytes)
        return parse_body(raw, self._settings.max_json_depth)
