"""Architecture, as a model's config.json names it -> its family. Adding one is a module and a row here.

Apart from registry.py so that a configuration can be checked without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig
from worker.models import configs


class Family(NamedTuple):
    module: str
    cls: str
    parse: Callable[[ConfigValues], DecoderConfig]  # StartupError names what cannot be computed


MODELS: dict[str, Family] = {
    "LlamaForCausalLM": Family("worker.models.llama", "LlamaForCausalLM", configs.parse_llama),
    "DeepseekV2ForCausalLM": Family(
        "worker.models.deepseek", "DeepseekV2ForCausalLM", configs.parse_deepseek_v2
    ),
    "DeepseekV3ForCausalLM": Family(
        "worker.models.deepseek", "DeepseekV3ForCausalLM", configs.parse_deepseek_v3
    ),
    "MistralForCausalLM": Family("worker.models.mistral", "MistralForCausalLM", configs.parse_mistral),
    "MixtralForCausalLM": Family("worker.models.sparse", "MixtralForCausalLM", configs.parse_mixtral),
    "Qwen2ForCausalLM": Family("worker.models.qwen2", "Qwen2ForCausalLM", configs.parse_qwen2),
    "Qwen3ForCausalLM": Family("worker.models.qwen3", "Qwen3ForCausalLM", configs.parse_qwen3),
    "Qwen3MoeForCausalLM": Family("worker.models.sparse", "Qwen3MoeForCausalLM", configs.parse_qwen3_moe),
}
GENERIC = Family("worker.models.generic", "GenericCausalLM", configs.parse_generic)
_DECODERS = ("ForCausalLM", "LMHeadModel")  # how transformers ends the names of what may be one


def family_of(config: ConfigValues) -> tuple[str, Family]:
    """The first architecture that has a family of its own, else one that may run through transformers.

    StartupError when there is neither.
    """
    names = config.texts("architectures")
    for name in names:
        if name in MODELS:
            return name, MODELS[name]
    for name in names:
        if name.endswith(_DECODERS):
            return name, GENERIC
    raise config.wrong(
        "architectures", f"a list with one of {', '.join(MODELS)}, or another decoder that transformers knows"
    )
