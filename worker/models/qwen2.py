"""Qwen2 and Qwen2.5: the Llama decoder with biases on queries, keys and values."""

from __future__ import annotations

from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig, parse_decoder
from worker.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse_config(config: ConfigValues) -> DecoderConfig:
        if config.flag("use_sliding_window"):
            raise config.wrong("use_sliding_window", "false; sliding windows are not supported")
        return parse_decoder(config, qkv_bias=True, output_bias=False, mlp_bias=False)
