"""Which part of a model one rank of an instance holds. Numbers only, so that it works without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import EXIT_INIT, StartupError
from worker.hf_config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of the `size` ranks that divide a model; pieces lie in the order of ranks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that schedules and samples."""
        return self.rank == 0

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


_WORLD_SIZE = "BackendConfig.ModelDeployConfig.ModelConfig[0].worldSize"
_MOST_RANKS = 64


def check_divides(config: DecoderConfig, size: int, folder: Path, *, has_own_family: bool) -> None:
    """Raise StartupError that says why `size` ranks cannot divide the model, and how many can.

    `has_own_family`: False for a model that runs through modules of transformers, which stay whole.
    """
    file = folder / "config.json"
    if size > 1 and not has_own_family:
        raise StartupError(
            f"{_WORLD_SIZE}={size}: the architecture in {file} runs through transformers' modules, which are"
            " not divided; allowed: 1, or more instances (modelInstanceNumber)",
            EXIT_INIT,
        )
    if faults := _faults(config, size):
        allowed = [str(other) for other in range(1, _MOST_RANKS + 1) if not _faults(config, other)]
        raise StartupError(
            f"{_WORLD_SIZE}={size}: {file} has {' and '.join(faults)}; allowed: {', '.join(allowed)}",
            EXIT_INIT,
        )


def _faults(config: DecoderConfig, size: int) -> list[str]:
    sizes = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    if config.experts is not None:
        sizes["moe_intermediate_size"] = config.experts.intermediate_size
    faults = [f"{name} {count}, no multiple of {size}" for name, count in sizes.items() if count % size]
    kv_heads = config.num_kv_heads
    if kv_heads % size and size % kv_heads:
        faults.append(f"num_key_value_heads {kv_heads}, neither a multiple nor a divisor of {size}")
    return faults
