"""A checkpoint's layers as a platform wants them: merged, packed, and noted for adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.quantisation import LinearType
from worker.layers.adapted import AdaptedLinear, Projection, StepAdapters
from worker.layers.quantized import SideBySide
from worker.layers.row_ops import Norm
from worker.loader import Checkpoint
from worker.platforms.base import Linear, Lookup, Platform
from worker.quantised_weights import mergeable, norm_tensors, take_quantised


class WeightReader:
    """Takes layers out of a checkpoint the way the platform wants them."""

    def __init__(self, checkpoint: Checkpoint, platform: Platform, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._platform = platform
        self._dtype = dtype
        self.row_ops = platform.row_ops
        self.step_adapters = StepAdapters()
        self.projections: dict[str, Projection] = {}
        self._holding = False

    @property
    def platform(self) -> Platform:
        return self._platform

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep files mapped while several layers are taken: opening them takes longer than a small layer."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            self._checkpoint.release()

    def _release(self) -> None:
        if not self._holding:
            self._checkpoint.release()

    def plain(self, module: str) -> Tensor:
        """The weight of a norm or an embedding, as it is."""
        weight = self._checkpoint.take(f"{module}.weight", dtype=self._dtype).to(self._platform.device)
        self._release()
        return weight

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor in a type that is not the model's."""
        tensor = self._checkpoint.take(name, dtype=dtype).to(self._platform.device)
        self._release()
        return tensor

    def floating(self, module: str) -> Tensor:
        """The weight of a linear layer that is taken apart; StartupError when it is quantised."""
        how = self._checkpoint.quantisation.type_of(module)
        if how != "FLOAT":
            raise StartupError(
                f"{self._checkpoint.folder}: {module}.weight is {how}; here it must be FLOAT, as it is"
                " multiplied into others",
                EXIT_INIT,
            )
        return self.plain(module)

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
        self._release()
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
        self._release()
        return linear

    def tied(self, module: str) -> tuple[Linear, Lookup]:
        """The head that is the embedding too, and the embedding."""
        weight = self._checkpoint.take(f"{module}.weight", dtype=self._dtype)
        both = self._platform.pack_tied(weight)
        self._release()
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
