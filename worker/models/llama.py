"""Llama: the base decoder. Grouped-query attention, rotary embedding, gated MLP, pre-normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from worker.attention.base import AttentionBackend, RotatingAttention
from worker.batch import Batch
from worker.hf_config import DecoderConfig
from worker.kv_cache import KvCache
from worker.kv_pages import KvPages
from worker.layers.rotary import RotaryTable
from worker.layers.row_ops import Norm
from worker.loader import EMBEDDING, HEAD, Checkpoint
from worker.models.configs import parse_llama
from worker.models.weight_reader import WeightReader
from worker.parallel import ParallelGroup
from worker.platforms.base import Lookup, Platform

GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_FINAL_NORM = "model.norm"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")

Shapes = dict[str, tuple[int, ...]]  # by name of the tensor


def linear_shapes(module: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{module}.weight": (rows, columns)}
    return weight | {f"{module}.bias": (rows,)} if bias else weight


def gated_mlp_shapes(
    prefix: str, hidden: int, inner: int, bias: bool = False, names: Sequence[str] = GATED_MLP
) -> Shapes:
    """`names`: of gate, up and down."""
    gate, up, down = (f"{prefix}{name}" for name in names)
    return {
        **linear_shapes(gate, inner, hidden, bias),
        **linear_shapes(up, inner, hidden, bias),
        **linear_shapes(down, hidden, inner, bias),
    }


class HeadNorms:
    """The norms of queries and keys, head by head, in one pass over both."""

    def __init__(self, reader: WeightReader, prefix: str, config: DecoderConfig) -> None:
        q_weight, k_weight = reader.plain(f"{prefix}q_norm"), reader.plain(f"{prefix}k_norm")
        # of each head, [heads, head_dim]; what is normalised is rounded before it is multiplied, as published
        self._weights = torch.cat(
            (
                q_weight.expand(reader.shard.count(config.num_heads), -1),
                k_weight.expand(reader.shard.count(config.num_kv_heads), -1),
            )
        )
        self._ones = torch.ones_like(q_weight)
        self._eps = config.rms_norm_eps
        self._ops = reader.row_ops

    def __call__(self, heads: Tensor) -> Tensor:
        """heads: [T, n, head_dim], queries and keys first -> these normalised, dense."""
        qk = heads[:, : len(self._weights)].reshape(-1, heads.shape[-1])
        normed = self._ops.add_rms_norm(qk, None, self._ones, self._eps)
        return normed.view(len(heads), -1, heads.shape[-1]).mul_(self._weights)


class SelfAttention:
    def __init__(self, config: DecoderConfig, reader: WeightReader, prefix: str) -> None:
        """`prefix`: of the layer."""
        self._num_heads = reader.shard.count(config.num_heads)
        self._head_dim = config.head_dim
        self._rotated_heads = self._num_heads + reader.shard.count(config.num_kv_heads)
        self._ops = reader.row_ops
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._qkv = reader.column_parallel(prefix, *_QKV, bias=config.qkv_bias, units=heads)
        self._norms = HeadNorms(reader, f"{prefix}self_attn.", config) if config.qk_norm else None
        self._output = reader.row_parallel(
            f"{prefix}self_attn.", "o_proj", bias=config.output_bias, units=config.num_heads
        )

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
        heads = self._qkv(x).view(len(x), -1, self._head_dim)
        qk = heads if self._norms is None else self._norms(heads)
        v = heads[:, self._rotated_heads :]
        if isinstance(attention, RotatingAttention):
            return self._output(attention.rotate_and_forward(qk, v, cos, sin, k_cache, v_cache))
        # queries and keys lie side by side: one rotation for both
        kv_heads = self._rotated_heads - self._num_heads
        q, k = self._ops.rotate_apart(qk, self._num_heads, kv_heads, cos, sin)
        return self._output(attention.forward(q, k, v, k_cache, v_cache))


class GatedMlp:
    def __init__(self, reader: WeightReader, prefix: str, bias: bool = False, *, whole: bool = True) -> None:
        """`prefix`: of its own. `whole`: False leaves the result this rank's share of a sum."""
        self._ops = reader.row_ops
        self._gate_up = reader.column_parallel(prefix, "gate_proj", "up_proj", bias=bias)
        self._down = reader.row_parallel(prefix, "down_proj", bias=bias, whole=whole)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        return self._down(self._ops.silu_mul(self._gate_up(x)))


class Attention(Protocol):
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


Mlp = Callable[[Tensor], Tensor]  # [T, hidden] -> [T, hidden]


class DecoderLayer:
    def __init__(self, input_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp) -> None:
        self._input_norm = input_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBackend,
        k_cache: KvPages,
        v_cache: KvPages,
    ) -> Tensor:
        """Adds delta, if there is one, and the attention to the residual stream x, [T, hidden], in place.

        -> what the MLP adds, left to whoever normalises x next: one pass over it then.
        """
        attended = self._attention(self._input_norm(x, delta), cos, sin, attention, k_cache, v_cache)
        return self._mlp(self._mlp_norm(x, attended))


class LlamaForCausalLM:
    """See worker/models/registry.py for the contract."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        platform: Platform,
        dtype: torch.dtype,
        max_seq_len: int,
        progress: Callable[[float], None],
        group: ParallelGroup,
    ) -> None:
        self._rotary = RotaryTable(config.rope, config.rotary_dim, max_seq_len, dtype, platform.device)
        reader = WeightReader(checkpoint, platform, dtype, group)
        # the largest tensor comes first: while it is packed there is little else in memory
        self._embed: Lookup
        if config.tie_word_embeddings and checkpoint.quantisation.type_of(HEAD) == "FLOAT":
            self._head, self._embed = reader.tied(EMBEDDING)
        else:
            self._embed = reader.embedding(EMBEDDING)
            self._head = reader.head(HEAD)
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(self.make_layer(config, reader, index))
            progress((index + 1) / (config.num_layers + 1))
        self.projections, self.step_adapters = reader.projections, reader.step_adapters
        self._final_norm = Norm(reader.plain(_FINAL_NORM), None, config.rms_norm_eps, platform.row_ops)
        progress(1.0)

    # -- what other families have otherwise -----------------------------------------------------------

    parse_config = staticmethod(parse_llama)

    @staticmethod
    def attention_inputs(config: DecoderConfig) -> Sequence[str]:
        """The linear layers behind the first norm of a layer."""
        return _QKV

    @staticmethod
    def mlp_inputs(config: DecoderConfig, index: int) -> Sequence[str]:
        """The linear layers behind the second norm of layer `index`."""
        return _GATE_UP

    @staticmethod
    def make_attention(config: DecoderConfig, reader: WeightReader, prefix: str) -> Attention:
        """`prefix`: of the layer."""
        return SelfAttention(config, reader, prefix)

    @staticmethod
    def make_mlp(config: DecoderConfig, reader: WeightReader, index: int) -> Mlp:
        return GatedMlp(reader, f"model.layers.{index}.mlp.", config.mlp_bias)

    @staticmethod
    def attention_shapes(config: DecoderConfig) -> Shapes:
        """Tensors of a layer's attention, by their names within the layer."""
        hidden = config.hidden_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        norms = ("self_attn.q_norm", "self_attn.k_norm") if config.qk_norm else ()
        return {
            **linear_shapes("self_attn.q_proj", q_size, hidden, config.qkv_bias),
            **linear_shapes("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
            **linear_shapes("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
            **linear_shapes("self_attn.o_proj", hidden, q_size, config.output_bias),
            **{f"{name}.weight": (config.head_dim,) for name in norms},
        }

    @staticmethod
    def mlp_shapes(config: DecoderConfig, index: int) -> Shapes:
        """As `attention_shapes`, of the MLP of layer `index`."""
        return gated_mlp_shapes("mlp.", config.hidden_size, config.intermediate_size, config.mlp_bias)

    # -- what all of them have ------------------------------------------------------------------------

    @classmethod
    def make_layer(cls, config: DecoderConfig, reader: WeightReader, index: int) -> DecoderLayer:
        prefix, eps = f"model.layers.{index}.", config.rms_norm_eps
        return DecoderLayer(
            reader.norm(prefix, "input_layernorm", cls.attention_inputs(config), eps),
            cls.make_attention(config, reader, prefix),
            reader.norm(prefix, "post_attention_layernorm", cls.mlp_inputs(config, index), eps),
            cls.make_mlp(config, reader, index),
        )

    @classmethod
    def tensor_shapes(cls, config: DecoderConfig) -> Shapes:
        hidden = config.hidden_size
        shapes: Shapes = {
            f"{EMBEDDING}.weight": (config.vocab_size, hidden),
            f"{_FINAL_NORM}.weight": (hidden,),
        }
        if not config.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = (config.vocab_size, hidden)
        for index in range(config.num_layers):
            shapes |= cls._layer_shapes(config, index)
        return shapes

    @classmethod
    def _layer_shapes(cls, config: DecoderConfig, index: int) -> Shapes:
        norms = {f"{name}.weight": (config.hidden_size,) for name in _NORMS}
        of_layer = {**norms, **cls.attention_shapes(config), **cls.mlp_shapes(config, index)}
        return {f"model.layers.{index}.{name}": shape for name, shape in of_layer.items()}

    @classmethod
    def ignorable_tensors(cls, config: DecoderConfig) -> frozenset[str]:
        # older exports stored what is computed here, and tied heads twice
        names = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq" for index in range(config.num_layers)}
        if config.tie_word_embeddings:
            names.add(f"{HEAD}.weight")
        return frozenset(names)

    def forward(self, batch: Batch, attention: AttentionBackend, cache: KvCache) -> Tensor:
        x = self._embed(batch.input_ids)
        cos, sin = self._rotary.gather(batch.positions)
        delta = None
        for layer, (k_cache, v_cache) in zip(self._layers, cache.layers, strict=True):
            delta = layer.forward(x, delta, cos, sin, attention, k_cache, v_cache)
        return x if delta is None else x.add_(delta)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._final_norm(hidden))
