"""Quantised layers out of a checkpoint; what their tensors mean is in engine/quantisation.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.quantisation import LinearType
from worker.layers.quantized import W8A16, QuantisedWeight, W8A8Dynamic, W8A8Static
from worker.loader import Checkpoint


def mergeable(checkpoint: Checkpoint, modules: Sequence[str]) -> list[tuple[LinearType, list[str]]]:
    """Neighbours of one type in one group; with constants for their activations, only if these are equal."""

    def kind(module: str) -> tuple[LinearType, float, float]:
        how = checkpoint.quantisation.type_of(module)
        return (how, *_input_constants(checkpoint, module)) if how == "W8A8" else (how, 0.0, 0.0)

    return [(how, list(group)) for (how, *_), group in groupby(modules, kind)]


def take_quantised(
    checkpoint: Checkpoint, how: LinearType, modules: Sequence[str], bias: bool
) -> QuantisedWeight:
    """The modules of one group, merged, outputs in the order given. StartupError names an unusable tensor."""
    weight = checkpoint.take(*(f"{module}.weight" for module in modules), dtype=torch.int8)
    if how == "W8A8":
        scale, offset = _input_constants(checkpoint, modules[0])
        quant_bias = checkpoint.take(*(f"{module}.quant_bias" for module in modules), dtype=torch.int32)
        deq_scale = torch.cat([_deq_scale(checkpoint, f"{module}.deq_scale") for module in modules])
        return W8A8Static(weight, scale, offset, quant_bias, deq_scale)
    scales = torch.cat([_channels(checkpoint, f"{module}.weight_scale") for module in modules])
    offsets = torch.cat([_offsets(checkpoint, module) for module in modules])
    biases = checkpoint.take(*(f"{module}.bias" for module in modules), dtype=torch.float32) if bias else None
    has_offset = bool(offsets.any())
    if how == "W8A16":
        return W8A16(weight, scales, offsets if has_offset else None, biases)
    if has_offset:
        raise _unusable(
            checkpoint, f"{modules[0]}.weight_offset", f"all zero for {how}; make the weights with w_sym"
        )
    return W8A8Dynamic(weight, scales, biases)


def norm_tensors(checkpoint: Checkpoint, norm: str, followers: Sequence[str]) -> tuple[str, str | None]:
    """Names of a norm's weight and bias (None: it has none), as the layers that follow it were made for."""
    if f"{norm}.module.weight" in checkpoint:
        quantised = {checkpoint.quantisation.type_of(module) != "FLOAT" for module in followers}
        if len(quantised) == 2:
            which = f"{followers[0]} and its neighbours"
            raise StartupError(
                f"{checkpoint.folder}: {norm}.module.weight is there for quantised layers, but only some of"
                f" {which} are quantised; all must be, or none",
                EXIT_INIT,
            )
        if True in quantised:
            norm += ".module"
    bias = f"{norm}.bias"
    return f"{norm}.weight", bias if bias in checkpoint else None


def _input_constants(checkpoint: Checkpoint, module: str) -> tuple[float, float]:
    """input_scale and input_offset."""
    scale = _channels(checkpoint, f"{module}.input_scale")
    if not bool((scale > 0).all()):
        raise _unusable(checkpoint, f"{module}.input_scale", "above 0")
    offset = float(_channels(checkpoint, f"{module}.input_offset").item())
    if not (-128 <= offset <= 127 and offset.is_integer()):
        raise _unusable(checkpoint, f"{module}.input_offset", "a whole number in [-128, 127]")
    return scale.item(), offset


def _channels(checkpoint: Checkpoint, name: str) -> Tensor:
    """float32 [n]."""
    return _finite(checkpoint, name, checkpoint.take(name, dtype=torch.float32).flatten())


def _offsets(checkpoint: Checkpoint, module: str) -> Tensor:
    name = f"{module}.weight_offset"
    rows = checkpoint.shape(f"{module}.weight")[0]
    return _channels(checkpoint, name) if name in checkpoint else torch.zeros(rows)


def _deq_scale(checkpoint: Checkpoint, name: str) -> Tensor:
    stored = checkpoint.raw(name).flatten()
    if stored.dtype is torch.int64:  # the bits of a float32, as the NPU's operator wants them
        stored = stored.to(torch.int32).view(torch.float32)
    return _finite(checkpoint, name, stored)


def _finite(checkpoint: Checkpoint, name: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise _unusable(checkpoint, name, "finite")
    return values


def _unusable(checkpoint: Checkpoint, name: str, legal: str) -> StartupError:
    return StartupError(f"{checkpoint.folder}: {name} must be {legal}", EXIT_INIT)
