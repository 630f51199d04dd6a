"""Qwen3: the Llama decoder with norms of each query and key head."""

from __future__ import annotations

from worker.models.configs import parse_qwen3
from worker.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    parse_config = staticmethod(parse_qwen3)
