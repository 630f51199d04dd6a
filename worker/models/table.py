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
    parse: Callable[[ConfigValues], DecoderConfig]  # StartupError names what cannot be computed


# the class in the module is called as the architecture is
MODELS: dict[str, Family] = {
    "LlamaForCausalLM": Family("worker.models.llama", configs.parse_llama),
    "MistralForCausalLM": Family("worker.models.mistral", configs.parse_mistral),
    "Qwen2ForCausalLM": Family("worker.models.qwen2", configs.parse_qwen2),
    "Qwen3ForCausalLM": Family("worker.models.qwen3", configs.parse_qwen3),
}
