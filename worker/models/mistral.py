"""Mistral: the Llama decoder, whose first release looks back no further than a window."""

from __future__ import annotations

from worker.models.configs import parse_mistral
from worker.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    parse_config = staticmethod(parse_mistral)
