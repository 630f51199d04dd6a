"""Llama: the base decoder. Grouped-query attention, rotary embedding, gated MLP, pre-normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from engine.quantisation import LinearType
from worker.attention.base import AttentionBackend
from worker.batch import Batch
from worker.hf_config import DecoderConfig
from worker.kv_cache import KvCache
from worker.kv_pages import KvPages
from worker.layers.adapted import AdaptedLinear, Projection, StepAdapters
from worker.layers.quantized import SideBySide
from worker.layers.rotary import RotaryTable
from worker.layers.row_ops import Norm
from worker.loader import EMBEDDING, HEAD, Checkpoint
from worker.models.configs import parse_llama
from worker.platforms.base import Linear, Lookup, Platform
from worker.quantised_weights import mergeable, norm_tensors, take_quantised

_FINAL_NORM = "model.norm"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


class WeightReader:
    """Takes layers out of a checkpoint the way the platform wants them."""

    def __init__(self, checkpoint: Checkpoint, platform: Platform, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._platform = platform
        self._dtype = dtype
        self.row_ops = platform.row_ops
        self.step_adapters = StepAdapters()
        self.projections: dict[str, Projection] = {}

    def plain(self, module: str) -> Tensor:
        """The weight of a norm or an embedding, as it is."""
        weight = self._checkpoint.take(f"{module}.weight", dtype=self._dtype).to(self._platform.device)
        self._checkpoint.release()
        return weight

    def norm(self, prefix: str, module: str, followers: Sequence[str], eps: float) -> Norm:
        """Of the layers named, which take what it gives."""
        names = [f"{prefix}{name}" for name in followers]
        weight, bias = norm_tensors(self._checkpoint, f"{prefix}{module}", names)
        device = self._platform.device
        norm = Norm(
            self._checkpoint.take(weight, dtype=self._dtype).to(device),
            None if bias is None else self._checkpoint.take(bias, dtype=self._dtype).to(device),
            eps,
            self.row_ops,
        )
        self._checkpoint.release()
        return norm

    def linear(self, prefix: str, *modules: str, bias: bool = False) -> Linear:
        """The named projections merged into one, outputs in the order given."""
        names = [f"{prefix}{module}" for module in modules]
        parts = [self._pack(how, group, bias) for how, group in mergeable(self._checkpoint, names)]
        return parts[0] if len(parts) == 1 else SideBySide(parts)

    def _pack(self, how: LinearType, names: Sequence[str], bias: bool) -> Linear:
        if how == "FLOAT":
            weight = self._checkpoint.take(*(f"{name}.weight" for name in names), dtype=self._dtype)
            biases = (
                self._checkpoint.take(*(f"{name}.bias" for name in names), dtype=self._dtype)
                if bias
                else None
            )
            linear = self._platform.pack_linear(weight, biases)
        else:
            given = take_quantised(self._checkpoint, how, names, bias)
            linear = self._platform.pack_quantised(given, self._dtype)
        self._checkpoint.release()
        return linear

    def tied(self, module: str) -> tuple[Linear, Lookup]:
        """The head that is the embedding too, and the embedding."""
        weight = self._checkpoint.take(f"{module}.weight", dtype=self._dtype)
        both = self._platform.pack_tied(weight)
        self._checkpoint.release()
        return both

    def adapted(self, prefix: str, *modules: str, bias: bool = False) -> AdaptedLinear:
        """As `linear`, and open to LoRA adapters; note where each projection ends up."""
        layer = AdaptedLinear(self.linear(prefix, *modules, bias=bias), self.step_adapters)
        start = 0
        for module in modules:
            rows, columns = self._checkpoint.shape(f"{prefix}{module}.weight")
            outputs = slice(start, start + rows)
            self.projections[f"{prefix}{module}"] = Projection(layer, outputs, columns)
            start += rows
        return layer


class HeadNorms:
    """The norms of queries and keys, head by head, in one pass over both."""

    def __init__(self, reader: WeightReader, prefix: str, config: DecoderConfig) -> None:
        q_weight, k_weight = reader.plain(f"{prefix}q_norm"), reader.plain(f"{prefix}k_norm")
        # of each head, [heads, head_dim]; what is normalised is rounded before it is multiplied, as published
        self._weights = torch.cat(
            (q_weight.expand(config.num_heads, -1), k_weight.expand(config.num_kv_heads, -1))
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
        self._num_heads = config.num_heads
        self._head_dim = config.head_dim
        self._rotated_heads = config.num_heads + config.num_kv_heads
        self._ops = reader.row_ops
        self._qkv = reader.adapted(prefix, *_QKV, bias=config.qkv_bias)
        self._norms = HeadNorms(reader, f"{prefix}self_attn.", config) if config.qk_norm else None
        self._output = reader.adapted(f"{prefix}self_attn.", "o_proj", bias=config.output_bias)

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
        # queries and keys lie side by side: one rotation for both
        qk = self._ops.rotate(qk, self._rotated_heads, cos, sin)
        q, k, v = qk[:, : self._num_heads], qk[:, self._num_heads :], heads[:, self._rotated_heads :]
        return self._output(attention.forward(q, k, v, k_cache, v_cache))


class GatedMlp:
    def __init__(self, config: DecoderConfig, reader: WeightReader, prefix: str) -> None:
        """`prefix`: of the layer."""
        self._ops = reader.row_ops
        self._gate_up = reader.adapted(prefix, *_GATE_UP, bias=config.mlp_bias)
        self._down = reader.adapted(f"{prefix}mlp.", "down_proj", bias=config.mlp_bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        return self._down(self._ops.silu_mul(self._gate_up(x)))


class DecoderLayer:
    def __init__(self, config: DecoderConfig, reader: WeightReader, prefix: str) -> None:
        eps = config.rms_norm_eps
        self._input_norm = reader.norm(prefix, "input_layernorm", _QKV, eps)
        self._attention = SelfAttention(config, reader, prefix)
        self._mlp_norm = reader.norm(prefix, "post_attention_layernorm", _GATE_UP, eps)
        self._mlp = GatedMlp(config, reader, prefix)

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
    ) -> None:
        self._rotary = RotaryTable(config.rope, config.head_dim, max_seq_len, dtype, platform.device)
        reader = WeightReader(checkpoint, platform, dtype)
        # the largest tensor comes first: while it is packed there is little else in memory
        self._embed: Lookup
        if config.tie_word_embeddings and checkpoint.quantisation.type_of(HEAD) == "FLOAT":
            self._head, self._embed = reader.tied(EMBEDDING)
        else:
            embedding = reader.plain(EMBEDDING)
            self._embed = lambda ids: functional.embedding(ids, embedding)
            self._head = reader.linear("", HEAD)
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(DecoderLayer(config, reader, f"model.layers.{index}."))
            progress((index + 1) / (config.num_layers + 1))
        self.projections, self.step_adapters = reader.projections, reader.step_adapters
        self._final_norm = Norm(reader.plain(_FINAL_NORM), None, config.rms_norm_eps, platform.row_ops)
        progress(1.0)

    parse_config = staticmethod(parse_llama)

    @staticmethod
    def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linears = {
            "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
            "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
            "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
            "self_attn.o_proj": (hidden, q_size, config.output_bias),
            "mlp.gate_proj": (inner, hidden, config.mlp_bias),
            "mlp.up_proj": (inner, hidden, config.mlp_bias),
            "mlp.down_proj": (hidden, inner, config.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (config.vocab_size, hidden),
            f"{_FINAL_NORM}.weight": (hidden,),
        }
        if not config.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = (config.vocab_size, hidden)
        for index in range(config.num_layers):
            prefix = f"model.layers.{index}."
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            for name in ("q_norm", "k_norm") if config.qk_norm else ():
                shapes[f"{prefix}self_attn.{name}.weight"] = (config.head_dim,)
        return shapes

    @staticmethod
    def ignorable_tensors(config: DecoderConfig) -> frozenset[str]:
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
