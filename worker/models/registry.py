"""The model class of a checkpoint, and what every such class offers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from worker.attention.base import AttentionBackend
from worker.batch import Batch
from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig
from worker.kv_cache import KvCache
from worker.layers.adapted import Projection, StepAdapters
from worker.loader import Checkpoint
from worker.models.table import family_of
from worker.parallel import ParallelGroup
from worker.platforms.base import Platform


class CausalModel(Protocol):
    """A decoder with its weights loaded."""

    projections: Mapping[str, Projection]  # by module name: what LoRA adapters may change
    step_adapters: StepAdapters  # of the layers these lie in; set before each step

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        platform: Platform,
        dtype: torch.dtype,
        max_seq_len: int,
        progress: Callable[[float], None],
        group: ParallelGroup,
    ) -> None:
        """Reads this rank's part of the weights; `config` is that of the whole model."""

    @staticmethod
    def parse_config(config: ConfigValues) -> DecoderConfig: ...

    @staticmethod
    def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]] | None:
        """Every tensor the checkpoint must hold. None: only loading can tell, and does."""

    @staticmethod
    def ignorable_tensors(config: DecoderConfig) -> frozenset[str]:
        """Tensors some checkpoints hold besides, of no use."""

    def forward(self, batch: Batch, attention: AttentionBackend, cache: KvCache) -> Tensor:
        """Hidden states of all query tokens, [T, hidden]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden] -> [R, vocab]."""


def model_class(config: ConfigValues) -> type[CausalModel]:
    """The class that serves what the config names; StartupError when there is none."""
    _, family = family_of(config)
    model: type[CausalModel] = getattr(importlib.import_module(family.module), family.cls)
    return model
