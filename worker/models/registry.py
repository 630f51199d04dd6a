"""Architecture, as config.json names it -> model class. Adding one is a module and a row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.attention.base import AttentionBackend
from worker.batch import Batch
from worker.hf_config import DecoderConfig
from worker.kv_cache import KvCache
from worker.loader import Checkpoint
from worker.platforms.base import Platform

MODELS: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("worker.models.llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("worker.models.qwen2", "Qwen2ForCausalLM"),
}


class CausalModel(Protocol):
    """A decoder with its weights loaded."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        platform: Platform,
        dtype: torch.dtype,
        max_seq_len: int,
        progress: Callable[[float], None],
    ) -> None: ...

    @staticmethod
    def parse_config(config: Mapping[str, Any]) -> DecoderConfig: ...

    @staticmethod
    def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold."""

    @staticmethod
    def ignorable_tensors(config: DecoderConfig) -> frozenset[str]:
        """Tensors some checkpoints hold besides, of no use."""

    def forward(self, batch: Batch, attention: AttentionBackend, cache: KvCache) -> Tensor:
        """Hidden states of all query tokens, [T, hidden]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden] -> [R, vocab]."""


def model_class(architectures: object) -> type[CausalModel]:
    """`architectures`: the value in config.json. StartupError when this build has none of them."""
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if name in MODELS:
            module, cls = MODELS[name]
            model: type[CausalModel] = getattr(importlib.import_module(module), cls)
            return model
    raise StartupError(
        f"model architecture {', '.join(map(str, names)) or 'not named in config.json'} is not supported;"
        f" supported: {', '.join(MODELS)}",
        EXIT_INIT,
    )
