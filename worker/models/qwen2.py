"""Qwen2 and Qwen2.5: the Llama decoder with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import EXIT_INIT, StartupError
from worker.hf_config import DecoderConfig, parse_decoder
from worker.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
        if config.get("use_sliding_window", False):
            raise StartupError("model config.json: use_sliding_window true is not supported", EXIT_INIT)
        return parse_decoder(config, qkv_bias=True, output_bias=False, mlp_bias=False)
