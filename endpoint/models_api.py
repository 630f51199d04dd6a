"""Bodies of GET /v1/models and GET /v1/models/{model}."""

from __future__ import annotations

from typing import Any

from endpoint import sse
from endpoint.protocols.base import ModelInfo
from engine.errors import NotFound


def check_served(model: ModelInfo, name: str) -> None:
    """`name`: of a model in a path. Raises NotFound unless it is the served one."""
    if name != model.name:
        raise NotFound("no model of this name is loaded; GET /v1/models lists the loaded ones")


def _card(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "MindIE Server",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_seq_len,
    }


def model_list(model: ModelInfo) -> bytes:
    return sse.dumps({"object": "list", "data": [_card(model)]}).encode()


def model_card(model: ModelInfo, name: str) -> bytes:
    """`name`: from the path. Raises NotFound unless it is the served model."""
    check_served(model, name)
    return sse.dumps(_card(model)).encode()
