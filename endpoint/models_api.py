"""Bodies of GET /v1/models and GET /v1/models/{model}."""

from __future__ import annotations

from typing import Any

from endpoint import sse
from endpoint.protocols.base import ModelInfo
from engine.errors import NotFound


def check_served(model: ModelInfo, name: str) -> None:
    """`name`: of a model in a path. Raises NotFound unless it is the base model."""
    if name != model.name:
        raise _unknown()


def _unknown() -> NotFound:
    return NotFound("no model of this name is loaded; GET /v1/models lists the loaded ones")


def _card(model: ModelInfo, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "MindIE Server",
        "root": root,
        "parent": parent,
        "max_model_len": model.max_seq_len,
    }


def _cards(model: ModelInfo) -> list[dict[str, Any]]:
    """The base model first, then its adapters."""
    base = _card(model, model.name, model.name, None)
    return [base, *(_card(model, name, root, model.name) for name, root in model.adapters.items())]


def model_list(model: ModelInfo) -> bytes:
    return sse.dumps({"object": "list", "data": _cards(model)}).encode()


def model_card(model: ModelInfo, name: str) -> bytes:
    """`name`: from the path. Raises NotFound unless it is the base model or a loaded adapter."""
    for card in _cards(model):
        if card["id"] == name:
            return sse.dumps(card).encode()
    raise _unknown()
