"""LoRA adapters on disk: checked as a whole against the model, then read into what its layers add."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.config_values import ConfigValues
from worker.layers.adapted import AdaptedLinear, Delta, Projection, merged_delta
from worker.platforms.base import Linear, Platform

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+\$?")
_STORED = ("F64", "F32", "F16", "BF16")
_MAX_COMPLAINTS = 5
# of PEFT's settings those that change the arithmetic: (key, what it must be)
_MUST_BE_OFF = ("use_dora", "lora_bias", "fan_in_fan_out")
_MUST_BE_EMPTY = ("modules_to_save", "layer_replication", "alora_invocation_tokens")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory, in the model's dtype."""

    deltas: tuple[tuple[AdaptedLinear, Delta], ...]
    rank: int  # the largest of its modules
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """adapter_config.json. The patterns are module names or the ends of them, the first that fits wins."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """What the product of the two matrices is multiplied with."""
        alpha, rank = _first_match(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter(
    folder: Path,
    projections: Mapping[str, Projection],
    dtype: torch.dtype,
    platform: Platform,
    *,
    max_rank: int,
    available_bytes: int,
) -> Adapter:
    """Raises StartupError, which says in one line what keeps the adapter from being used with this model.

    `max_rank`: 0 for any. `available_bytes`: what it may take.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        _check_file(folder / name)
    config = _read_config(folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as handle:
            modules = _check_tensors(file, handle, config, projections)
            rank = max(config.rank_of(module) for module in modules)
            if max_rank and rank > max_rank:
                raise _refusal(folder / CONFIG_FILE, f"rank {rank} is above maxLoraRank {max_rank}")
            sizes = (
                config.rank_of(m) * (projections[m].in_features + projections[m].out_features)
                for m in modules
            )
            num_bytes = sum(sizes) * dtype.itemsize
            if num_bytes > available_bytes:
                needed, free = num_bytes >> 20, max(0, available_bytes) >> 20
                raise _refusal(file, f"needs {needed} MiB of memory, but {free} MiB are free")
            deltas = _take(handle, modules, config, projections, dtype, platform)
    except (OSError, SafetensorError) as error:
        raise _refusal(file, f"cannot be read: {error}") from None
    return Adapter(deltas, rank, num_bytes)


def _refusal(file: Path, reason: str) -> StartupError:
    return StartupError(f"{file}: {reason}", EXIT_INIT)


def _check_file(file: Path) -> None:
    """A regular file: anything else could block its reader for ever."""
    try:
        info = file.stat()
    except (OSError, ValueError) as error:
        raise _refusal(file, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(info.st_mode):
        raise _refusal(file, "is no regular file")
    if file.name == CONFIG_FILE and info.st_size > _MAX_CONFIG_BYTES:
        raise _refusal(file, f"is larger than {_MAX_CONFIG_BYTES >> 20} MiB")


def _read_config(file: Path) -> LoraConfig:
    config = ConfigValues.read(file)
    if config.text("peft_type", "LORA").upper() != "LORA":
        raise config.wrong("peft_type", '"LORA"')
    for key in _MUST_BE_OFF:
        if config.flag(key):
            raise config.wrong(key, "false: this kind of adapter is not supported")
    for key in _MUST_BE_EMPTY:
        if config.raw(key):
            raise config.wrong(key, "null or empty: this kind of adapter is not supported")
    if config.text("bias", "none") != "none":
        raise config.wrong("bias", '"none": trained biases are not supported')
    if config.raw("lora_alpha") is None:
        raise config.wrong("lora_alpha", "a number")
    ranks, alphas = config.section("rank_pattern"), config.section("alpha_pattern")
    for patterns in (ranks, alphas):
        for name in patterns.names():
            if not _PATTERN.fullmatch(name):
                raise patterns.refusal(f"the pattern {name[:60]!r} must be a module's name, or the end of it")
    return LoraConfig(
        rank=config.positive("r"),
        alpha=config.number("lora_alpha", 0.0, least=0.0),
        rank_pattern={name: ranks.positive(name) for name in ranks.names()},
        alpha_pattern={name: alphas.number(name, 0.0, least=0.0) for name in alphas.names()},
        rank_stabilised=config.flag("use_rslora"),
    )


def _first_match(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$")
        if module == name or (not pattern.startswith("^") and module.endswith(f".{name}")):
            return value
    return otherwise


def _check_tensors(
    file: Path, handle: Any, config: LoraConfig, projections: Mapping[str, Projection]
) -> list[str]:
    """The modules the file changes, in the model's order; every tensor is one the model has a place for."""
    complaints = []
    found: set[tuple[str, str]] = set()
    for key in sorted(handle.keys()):
        match = _TENSOR.fullmatch(key)
        if match is None or match[1] not in projections:
            complaints.append(f"{key} belongs to no projection of this model that adapters can change")
            continue
        module, side = match[1], match[2]
        found.add((module, side))
        projection, rank = projections[module], config.rank_of(module)
        wanted = [rank, projection.in_features] if side == "A" else [projection.out_features, rank]
        header = handle.get_slice(key)
        if header.get_shape() != wanted:
            complaints.append(f"{key} is {header.get_shape()}, but rank and model make it {wanted}")
        if header.get_dtype() not in _STORED:
            complaints.append(f"{key} is stored as {header.get_dtype()}, but must be {', '.join(_STORED)}")
    for module, side in sorted(found):
        other = "B" if side == "A" else "A"
        if (module, other) not in found:
            complaints.append(f"base_model.model.{module}.lora_{other}.weight is missing")
    if complaints:
        more = len(complaints) - _MAX_COMPLAINTS
        shown = "; ".join(complaints[:_MAX_COMPLAINTS]) + (f"; and {more} more" if more > 0 else "")
        raise _refusal(file, f"does not fit the model: {shown}")
    if not found:
        raise _refusal(file, "holds no tensors")
    return [module for module in projections if (module, "A") in found]


def _take(
    handle: Any,
    modules: list[str],
    config: LoraConfig,
    projections: Mapping[str, Projection],
    dtype: torch.dtype,
    platform: Platform,
) -> tuple[tuple[AdaptedLinear, Delta], ...]:
    by_layer: dict[int, list[tuple[Projection, Tensor, Tensor]]] = {}
    for module in modules:
        projection = projections[module]
        a, b = (handle.get_slice(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
        # of the inner product each rank has its inputs' share, of what comes out its own outputs
        a, b = a[:, projection.own_inputs], b[projection.own_outputs]
        # in float32, so that a scaling that is no power of two is rounded once
        b = (b.float() * config.scaling_of(module)).to(platform.device, dtype)
        change = (projection, a.to(platform.device, dtype, copy=True), b)
        by_layer.setdefault(id(projection.layer), []).append(change)

    def pack(weight: Tensor) -> Linear:
        return platform.pack_linear(weight, None)

    return tuple((changes[0][0].layer, merged_delta(changes, pack)) for changes in by_layer.values())
