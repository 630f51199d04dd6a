"""Tiny checkpoints written by transformers, and settings and plans around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.settings import ModelSettings, ScheduleSettings
from worker.runner import ModelRunner
from worker.shard import Shard

BLOCK_SIZE = 8
MAX_SEQ_LEN = 128
NUM_BLOCKS = 64

MODEL = ModelSettings(
    name="tiny",
    weight_path=Path(),
    instance_type="Standard",
    device_type="cpu",
    dtype="auto",
    kv_cache_gib=-1,
    kv_cache_mib=0,
    kv_block_num=0,
    memory_fraction=0.8,
    cpu_threads=1,
    trust_remote_code=False,
    ignore_eos=False,
    world_size=1,
    cpu_mem_gib=0,
)
SCHEDULE = ScheduleSettings(
    block_size=BLOCK_SIZE,
    max_prefill_batch_size=8,
    max_prefill_tokens=256,
    max_batch_size=8,
    max_iter_times=64,
    max_queue_delay_us=0,
    max_first_token_wait_ms=0,
    max_n=1,
    max_seq_len=MAX_SEQ_LEN,
    max_input_len=MAX_SEQ_LEN - 1,
    truncation="off",
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": MAX_SEQ_LEN,
    "initializer_range": 0.15,  # large enough that attention and position matter to the logits
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_YARN_SCALED = {**_YARN, "mscale": 0.707, "mscale_all_dim": 1.0}
_LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

# name -> (family, what differs from _SHAPE)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": _LLAMA3}),
    "llama-mqa-bias-headdim": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"num_key_value_heads": 3, "rope_parameters": _YARN}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 3, "sliding_window": 13, "head_dim": 16}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias-yarn": (
        "Qwen3",
        {"num_key_value_heads": 6, "head_dim": 10, "attention_bias": True, "rope_parameters": _YARN},
    ),
    "mixtral": (
        "Mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek-v2-lite": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "rope_parameters": _YARN_SCALED}),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": 24,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": _YARN_SCALED,
        },
    ),
    # through transformers' own modules
    "generic-granite": (
        "Granite",
        {"num_key_value_heads": 2, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "llama-linear": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
}


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Any:
    """Write the named checkpoint with random weights; returns the transformers model in eval mode."""
    import transformers

    family, extra = CHECKPOINTS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **extra}, eos_token_id=2)
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **save)
    return model


class Harness:
    """A runner with its cache, and sequences that own disjoint, shuffled blocks."""

    def __init__(
        self,
        folder: Path,
        model: ModelSettings = MODEL,
        schedule: ScheduleSettings = SCHEDULE,
        join: tuple[Shard, Path] | None = None,
    ) -> None:
        """`join`: this process is one rank of several, which meet at the file."""
        self.runner = ModelRunner(
            replace(model, weight_path=folder), schedule, 0, lambda phase, fraction: None
        )
        if join is not None:
            self.runner.join(*join, timeout_s=60.0)
        self.runner.load()
        self.runner.allocate(NUM_BLOCKS)
        self._free = np.random.default_rng(7).permutation(NUM_BLOCKS).tolist()

    def sequence(self, prompt: list[int], max_tokens: int = 64) -> Sequence:
        return Sequence(0, np.array(prompt, np.int32), SamplingParams(max_tokens=max_tokens))

    def forward(self, kind: StepKind, sequences: list[Sequence]) -> torch.Tensor:
        """Give the sequences the blocks they need, run the step and count its tokens as computed."""
        for sequence in sequences:
            while len(sequence.block_table) * BLOCK_SIZE < sequence.num_tokens:
                sequence.block_table.append(self._free.pop())
        plan: StepPlan = build_plan(kind, sequences, BLOCK_SIZE)
        logits = self.runner.forward(plan)
        for sequence in sequences:
            sequence.num_computed = sequence.num_tokens
        return logits


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests must not depend on the machine's cores; a runner sets the process-wide number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """(folder, transformers model) of a named checkpoint, written once per dtype."""
    made: dict[tuple[str, torch.dtype], tuple[Path, Any]] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, dtype] = (folder, write_checkpoint(folder, name, dtype))
        return made[name, dtype]

    return get
