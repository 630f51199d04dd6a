"""Small random decoders with shapes an NPU serves, and runners that take steps with them on any device."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.worker.conftest import MODEL, SCHEDULE
from worker.platforms.driver_trial import Driver
from worker.runner import ModelRunner

BLOCK_SIZE = 128
NUM_BLOCKS = 16
VOCAB = 211
_POSITIONS = 640

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _POSITIONS,
    "initializer_range": 0.15,  # large enough that attention and position matter to the logits
    "eos_token_id": 2,
}
# name -> (family, what differs); heads of 64 and 32 are rotated by other operators than heads of 16
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 64}),
    "llama-narrow": ("Llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"hidden_size": 128, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral-window": ("Mistral", {"head_dim": 32, "sliding_window": 50}),
}


def write_decoder(folder: Path, name: str, dtype: torch.dtype, **changes: Any) -> None:
    """Write a checkpoint of the named family with random weights; `changes` to its configuration."""
    import transformers

    family, extra = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **extra, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


# the driver answers every worker the same; asking it takes a process that imports torch_npu, and seconds
Driver.ask = functools.cache(Driver.ask)


class Decoder:
    """A model on a device. Its sequences own disjoint blocks in no order, the same on every device."""

    def __init__(self, folder: Path, device_type: str) -> None:
        settings = replace(MODEL, weight_path=folder, device_type=device_type)
        schedule = replace(
            SCHEDULE,
            block_size=BLOCK_SIZE,
            max_prefill_tokens=_POSITIONS,
            max_seq_len=_POSITIONS,
            max_input_len=_POSITIONS - 1,
        )
        self.runner = ModelRunner(settings, schedule, 0, lambda phase, fraction: None)
        self.runner.load()
        self.runner.allocate(NUM_BLOCKS)
        self._free = np.random.default_rng(7).permutation(NUM_BLOCKS).tolist()

    def sequence(self, prompt: Many[int]) -> Sequence:
        return Sequence(0, np.array(prompt, np.int32), SamplingParams(max_tokens=_POSITIONS - len(prompt)))

    def step(self, kind: StepKind, sequences: list[Sequence]) -> Tensor:
        """Logits after all tokens the sequences have by now, float32 [R, vocab] on the CPU."""
        for sequence in sequences:
            while len(sequence.block_table) * BLOCK_SIZE < sequence.num_tokens:
                sequence.block_table.append(self._free.pop())
        logits = self.runner.forward(build_plan(kind, sequences, BLOCK_SIZE))
        for sequence in sequences:
            sequence.num_computed = sequence.num_tokens
        return logits.float().cpu()


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, VOCAB, length).tolist()
