"""DeepSeek-V2 and V3: attention over latent vectors, experts beside a shared one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.attention.base import AttentionBackend
from worker.hf_config import DecoderConfig, LatentConfig
from worker.kv_pages import KvPages
from worker.layers.latent import Headwise, pairs_apart
from worker.models.configs import parse_deepseek_v2, parse_deepseek_v3
from worker.models.llama import Attention, Shapes, linear_shapes
from worker.models.sparse import SparseForCausalLM
from worker.models.weight_reader import WeightReader

_KV_A = "self_attn.kv_a_proj_with_mqa"
_Q_A = "self_attn.q_a_proj"
_Q = "self_attn.q_proj"
_EPS = 1e-6  # of the norms within attention, whatever rms_norm_eps says


class LatentAttention:
    """All heads attend to the latent vectors themselves; worker/layers/latent.py says why they may.

    What is cached of a token is one head of kv_rank + rotary_dim numbers, which serves as key and as value:
    the part of the result that came from what is rotated is dropped.
    """

    def __init__(self, config: DecoderConfig, reader: WeightReader, prefix: str) -> None:
        """`prefix`: of the layer."""
        assert config.latent is not None
        self._latent = latent = config.latent
        self._heads = reader.shard.count(config.num_heads)
        self._ops = reader.row_ops
        inner = f"{prefix}self_attn."
        if latent.q_rank is None:
            self._q_a = self._q_norm = None
            self._q = reader.column_parallel(prefix, _Q, units=(config.num_heads,))
        else:
            self._q_a = reader.adapted(prefix, _Q_A, bias=config.qkv_bias)
            self._q_norm = reader.norm(inner, "q_a_layernorm", ["q_b_proj"], _EPS)
            self._q = reader.column_parallel(inner, "q_b_proj", units=(config.num_heads,))
        self._kv_a = reader.adapted(prefix, _KV_A, bias=config.qkv_bias)
        self._kv_norm = reader.norm(inner, "kv_a_layernorm", ["kv_b_proj"], _EPS)
        self._to_latent, self._from_latent = _absorbed(config.num_heads, latent, reader, f"{inner}kv_b_proj")
        self._output = reader.row_parallel(inner, "o_proj", bias=config.output_bias, units=config.num_heads)
        # a backend scales by the width of what is cached
        self._query_scale = latent.scale * config.head_dim**0.5

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBackend,
        k_cache: KvPages,
        v_cache: KvPages,
    ) -> Tensor:
        """x: [T, hidden], normalised -> [T, hidden]."""
        latent = self._latent
        q = self._q(x if self._q_a is None or self._q_norm is None else self._q_norm(self._q_a(x)))
        q = q.view(len(x), self._heads, -1)
        kv = self._kv_a(x)
        keys = torch.cat(
            (
                self._kv_norm(kv[:, : latent.kv_rank].contiguous()).unsqueeze(1),
                self._rotated(kv[:, None, latent.kv_rank :], cos, sin),
            ),
            dim=-1,
        )
        rotated = self._rotated(q[..., latent.plain_dim :], cos, sin)
        queries = torch.cat((self._to_latent(q[..., : latent.plain_dim]), rotated), dim=-1)
        out = attention.forward(queries.mul_(self._query_scale), keys, keys, k_cache, v_cache)
        values = self._from_latent(out.view(len(x), self._heads, -1)[..., : latent.kv_rank])
        return self._output(values.flatten(1))

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """heads: [T, n, rotary_dim] -> the same rotated, dense."""
        apart = pairs_apart(heads) if self._latent.interleaved else heads.contiguous()
        return self._ops.rotate(apart, apart.shape[1], cos, sin)


def _absorbed(
    num_heads: int, latent: LatentConfig, reader: WeightReader, module: str
) -> tuple[Headwise, Headwise]:
    """What takes the plain part of queries to the latent space, and what brings values out of it, by head."""
    weight = reader.heads_of(module, num_heads).view(-1, latent.plain_dim + latent.value_dim, latent.kv_rank)
    keys, values = weight[:, : latent.plain_dim], weight[:, latent.plain_dim :]
    pack = reader.platform.pack_linear
    return (
        Headwise([pack(key.t().contiguous(), None) for key in keys]),
        Headwise([pack(value.contiguous(), None) for value in values]),
    )


class DeepseekV2ForCausalLM(SparseForCausalLM):
    parse_config = staticmethod(parse_deepseek_v2)

    @staticmethod
    def attention_inputs(config: DecoderConfig) -> Sequence[str]:
        assert config.latent is not None
        return (_Q if config.latent.q_rank is None else _Q_A, _KV_A)

    @staticmethod
    def make_attention(config: DecoderConfig, reader: WeightReader, prefix: str) -> Attention:
        return LatentAttention(config, reader, prefix)

    @staticmethod
    def attention_shapes(config: DecoderConfig) -> Shapes:
        latent, hidden, heads = config.latent, config.hidden_size, config.num_heads
        assert latent is not None
        q_size = heads * (latent.plain_dim + latent.rotary_dim)
        if latent.q_rank is None:
            queries = linear_shapes(_Q, q_size, hidden)
        else:
            queries = {
                **linear_shapes(_Q_A, latent.q_rank, hidden, config.qkv_bias),
                "self_attn.q_a_layernorm.weight": (latent.q_rank,),
                **linear_shapes("self_attn.q_b_proj", q_size, latent.q_rank),
            }
        kv_size = heads * (latent.plain_dim + latent.value_dim)
        return {
            **queries,
            **linear_shapes(_KV_A, latent.kv_rank + latent.rotary_dim, hidden, config.qkv_bias),
            "self_attn.kv_a_layernorm.weight": (latent.kv_rank,),
            **linear_shapes("self_attn.kv_b_proj", kv_size, latent.kv_rank),
            **linear_shapes("self_attn.o_proj", hidden, heads * latent.value_dim, config.output_bias),
        }

    @classmethod
    def ignorable_tensors(cls, config: DecoderConfig) -> frozenset[str]:
        """Besides those of others the layers behind the last, which guess ahead."""
        names = set(super().ignorable_tensors(config))
        for index in range(config.num_layers, config.num_layers + config.num_extra_layers):
            names |= cls._layer_shapes(config, index).keys()
            names |= {f"model.layers.{index}.{name}.weight" for name in _OF_EXTRA_LAYERS}
        return frozenset(names)


_OF_EXTRA_LAYERS = ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm", "shared_head.head")


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    parse_config = staticmethod(parse_deepseek_v3)
