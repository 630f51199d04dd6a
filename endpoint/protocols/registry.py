"""Which dialects there are. A new one is a module and a row here."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from endpoint.protocols.base import ProtocolAdapter

ADAPTERS: dict[str, tuple[str, str]] = {
    "openai_chat": ("endpoint.protocols.openai_chat", "OpenAIChat"),
    "openai_completions": ("endpoint.protocols.openai_completions", "OpenAICompletions"),
    "vllm_generate": ("endpoint.protocols.vllm_generate", "VllmGenerate"),  # before tgi_generate: it is picky
    "tgi_generate": ("endpoint.protocols.tgi", "TGIGenerate"),
    "tgi_generate_stream": ("endpoint.protocols.tgi", "TGIGenerateStream"),
    "tgi_root": ("endpoint.protocols.tgi", "TGIRoot"),
    "triton_generate": ("endpoint.protocols.triton", "TritonGenerate"),
    "triton_generate_stream": ("endpoint.protocols.triton", "TritonGenerateStream"),
    "triton_infer": ("endpoint.protocols.triton", "TritonInfer"),
    "mindie_native": ("endpoint.protocols.mindie_native", "MindIENative"),
}


def load_adapters() -> list[ProtocolAdapter]:
    """One instance of every adapter, in the order in which adapters that share a path are asked."""
    classes = [getattr(import_module(module), name) for module, name in ADAPTERS.values()]
    return [cast(ProtocolAdapter, adapter()) for adapter in classes]
