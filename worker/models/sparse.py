"""Decoders whose MLPs are experts, of which each token takes a few: Mixtral, Qwen3-MoE, what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker.hf_config import DecoderConfig, ExpertsConfig
from worker.layers.moe import RoutedExperts, Router, WithShared
from worker.models.configs import parse_mixtral, parse_qwen3_moe
from worker.models.llama import GATED_MLP, GatedMlp, LlamaForCausalLM, Mlp, Shapes, gated_mlp_shapes
from worker.models.weight_reader import WeightReader
from worker.platforms.base import Linear

_EXPERTS_AT_ONCE = 16  # whose pages are mapped together; all of a layer may be larger than the memory


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a checkpoint names the parts of a layer's experts."""

    block: str = "mlp."
    router: str = "gate"
    linears: tuple[str, str, str] = GATED_MLP

    def expert(self, number: int) -> str:
        return f"{self.block}experts.{number}."


class SparseForCausalLM(LlamaForCausalLM):
    names = ExpertNames()

    @classmethod
    def mlp_inputs(cls, config: DecoderConfig, index: int) -> Sequence[str]:
        if config.experts is None or index in config.experts.dense_layers:
            return super().mlp_inputs(config, index)
        # the router stays in floating point, whatever the experts are in
        return [f"{cls.names.expert(0)}{name}" for name in cls.names.linears[:2]]

    @classmethod
    def make_mlp(cls, config: DecoderConfig, reader: WeightReader, index: int) -> Mlp:
        experts = config.experts
        if experts is None or index in experts.dense_layers:
            return super().make_mlp(config, reader, index)
        prefix = f"model.layers.{index}.{cls.names.block}"
        own = reader.shard.whole_experts.part(experts.num_experts)
        routed = RoutedExperts(
            cls._router(experts, reader, f"{prefix}{cls.names.router}"),
            cls._experts(own, reader, f"model.layers.{index}."),
            reader.row_ops,
            first=own.start,
        )
        mlp: Mlp = routed
        if experts.shared_intermediate_size:
            mlp = WithShared(routed, GatedMlp(reader, f"{prefix}shared_experts.", whole=False))
        # each rank has some experts, or a part of each: one sum over the ranks for all that a token goes to
        return mlp if reader.shard.size == 1 else lambda x: reader.group.sum(mlp(x))

    @staticmethod
    def _router(experts: ExpertsConfig, reader: WeightReader, module: str) -> Router:
        correction = None
        if experts.has_correction:
            correction = reader.tensor(f"{module}.e_score_correction_bias", torch.float32)
        if experts.exact:
            linear = reader.platform.pack_linear(reader.tensor(f"{module}.weight", torch.float32), None)
        else:
            linear = reader.linear("", module)
        return Router(experts, linear, correction)

    @classmethod
    def _experts(cls, own: slice, reader: WeightReader, prefix: str) -> list[tuple[Linear, Linear]]:
        """Of this rank's experts each: gate and up merged, and down."""
        gate, up, down = cls.names.linears
        packed = []
        for first in range(own.start, own.stop, _EXPERTS_AT_ONCE):
            with reader.holding():
                for number in range(first, min(first + _EXPERTS_AT_ONCE, own.stop)):
                    at = f"{prefix}{cls.names.expert(number)}"
                    packed.append(reader.expert(at, gate, up, down))
        return packed

    @classmethod
    def mlp_shapes(cls, config: DecoderConfig, index: int) -> Shapes:
        experts, hidden = config.experts, config.hidden_size
        if experts is None or index in experts.dense_layers:
            return super().mlp_shapes(config, index)
        router = f"{cls.names.block}{cls.names.router}"
        shapes: Shapes = {f"{router}.weight": (experts.num_experts, hidden)}
        if experts.has_correction:
            shapes[f"{router}.e_score_correction_bias"] = (experts.num_experts,)
        for number in range(experts.num_experts):
            shapes |= gated_mlp_shapes(
                cls.names.expert(number), hidden, experts.intermediate_size, names=cls.names.linears
            )
        if experts.shared_intermediate_size:
            shared = f"{cls.names.block}shared_experts."
            shapes |= gated_mlp_shapes(shared, hidden, experts.shared_intermediate_size)
        return shapes


class MixtralForCausalLM(SparseForCausalLM):
    parse_config = staticmethod(parse_mixtral)
    names = ExpertNames(block="block_sparse_moe.", linears=("w1", "w3", "w2"))


class Qwen3MoeForCausalLM(SparseForCausalLM):
    parse_config = staticmethod(parse_qwen3_moe)
