"""Which dialects there are. A new one is a module and a row here."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from endpoint.protocols.base import ProtocolAdapter

ADAPTERS: dict[str, tuple[str, str]] = {
    "openai_chat": ("endpoint.protocols.openai_chat", "OpenAIChat"),
    "openai_completions": ("endpoint.protocols.openai_completions", "OpenAICompletions"),
    "mindie_native": ("endpoint.protocols.mindie_native", "MindIENative"),
}


def load_adapters() -> list[ProtocolAdapter]:
    """One instance of every adapter, in the order in which adapters that share a path are asked."""
    classes = [getattr(import_module(module), name) for module, name in ADAPTERS.values()]
    return [cast(ProtocolAdapter, adapter()) for adapter in classes]
