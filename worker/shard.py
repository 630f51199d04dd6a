"""Which part of a model one rank of an instance holds. Numbers only, so that it works without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import EXIT_INIT, StartupError
from worker.hf_config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of the `size` ranks that divide a model; pieces lie in the order of ranks.

    The experts of a layer are dealt to `moe_ep` groups of neighbours, whose ranks divide each of theirs.
    """

    rank: int = 0
    size: int = 1
    moe_ep: int = 1  # a divisor of size

    @property
    def leads(self) -> bool:
        """Whether this is the rank that schedules and samples."""
        return self.rank == 0

    @property
    def whole_experts(self) -> Shard:
        """This rank's group among those that experts are dealt to whole."""
        return Shard(self.rank // self.moe_tp, self.moe_ep)

    @property
    def within_expert(self) -> Shard:
        """This rank among those of its group, which have the same experts."""
        return Shard(self.rank % self.moe_tp, self.moe_tp)

    @property
    def moe_tp(self) -> int:
        """Ranks that divide an expert."""
        return self.size // self.moe_ep

    def count(self, units: int) -> int:
        """How many of `units` (heads, columns, ...) this rank has."""
        return max(1, units // self.size)

    def part(self, length: int, units: int | None = None) -> slice:
        """This rank's place on a dimension of `length` that consists of `units` equal units, never cut.

        `units`: None: each number is one. With fewer units than ranks, neighbours hold the same one: so it
        is with heads of keys and values, which are computed and kept twice rather than halved.
        """
        units = units or length
        width, count = length // units, self.count(units)
        first = self.rank * units // self.size
        return slice(first * width, (first + count) * width)


WHOLE = Shard()


_MODEL_CONFIG = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
_MOST_RANKS = 64


def check_divides(config: DecoderConfig, shard: Shard, folder: Path, *, has_own_family: bool) -> None:
    """Raise StartupError that says why `shard.size` ranks cannot divide the model so, and how many can.

    `has_own_family`: False for a model that runs through modules of transformers, which stay whole.
    """
    file, size = folder / "config.json", shard.size
    if size > 1 and not has_own_family:
        raise StartupError(
            f"{_MODEL_CONFIG}.worldSize={size}: the architecture in {file} runs through transformers'"
            " modules, which are not divided; allowed: 1, or more instances (modelInstanceNumber)",
            EXIT_INIT,
        )
    if fault := _undealt(config, shard.moe_ep):
        divisors = [other for other in range(1, size + 1) if size % other == 0]
        allowed = [str(other) for other in divisors if not _undealt(config, other)]
        raise StartupError(
            f"{_MODEL_CONFIG}.moe_ep={shard.moe_ep}: {file} has {fault}; allowed: {', '.join(allowed)}",
            EXIT_INIT,
        )
    if faults := _faults(config, size, shard.moe_ep):
        multiples = range(shard.moe_ep, _MOST_RANKS + 1, shard.moe_ep)
        allowed = [str(other) for other in multiples if not _faults(config, other, shard.moe_ep)]
        others = f"; allowed: {', '.join(allowed)}" if allowed else ""
        raise StartupError(
            f"{_MODEL_CONFIG}.worldSize={size}: {file} has {' and '.join(faults)}{others}", EXIT_INIT
        )


def _undealt(config: DecoderConfig, moe_ep: int) -> str:
    """Why so many groups of ranks cannot have the same number of whole experts each; empty when they can."""
    if config.experts is None:
        return "no experts" if moe_ep > 1 else ""
    count = config.experts.num_experts
    return f"{count} experts, no multiple of {moe_ep}" if count % moe_ep else ""


def _faults(config: DecoderConfig, size: int, moe_ep: int) -> list[str]:
    sizes = [("num_attention_heads", config.num_heads, size), ("vocab_size", config.vocab_size, size)]
    experts = config.experts
    if experts is None or experts.dense_layers:
        sizes.append(("intermediate_size", config.intermediate_size, size))
    if experts is not None:
        sizes.append(("experts' intermediate_size", experts.intermediate_size, size // moe_ep))
        sizes.append(("shared experts' intermediate_size", experts.shared_intermediate_size, size))
    faults = [f"{name} {count}, no multiple of {ranks}" for name, count, ranks in sizes if count % ranks]
    kv_heads = config.num_kv_heads
    if kv_heads % size and size % kv_heads:
        faults.append(f"num_key_value_heads {kv_heads}, neither a multiple nor a divisor of {size}")
    return faults
