"""Qwen2 and Qwen2.5: the Llama decoder with biases on queries, keys and values."""

from __future__ import annotations

from worker.models.configs import parse_qwen2
from worker.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    parse_config = staticmethod(parse_qwen2)
