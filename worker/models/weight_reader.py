"""A checkpoint's layers as a platform wants them: merged, packed, and noted for adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import EXIT_INIT, StartupError
from engine.quantisation import LinearType
from worker.layers.adapted import AdaptedLinear, Projection, StepAdapters
from worker.layers.divided import DividedLookup, JoinedLinear, SummedLinear
from worker.layers.quantized import SideBySide, W8A8Static
from worker.layers.row_ops import Norm
from worker.loader import Checkpoint
from worker.parallel import ParallelGroup
from worker.platforms.base import Linear, Lookup, Platform
from worker.quantised_weights import mergeable, norm_tensors, take_quantised


class WeightReader:
    """Takes layers out of a checkpoint the way the platform wants them."""

    def __init__(
        self, checkpoint: Checkpoint, platform: Platform, dtype: torch.dtype, group: ParallelGroup
    ) -> None:
        """`group`: the ranks that divide the model; what is read is this rank's part."""
        self._checkpoint = checkpoint
        self._platform = platform
        self._dtype = dtype
        self.group = group
        self.shard = group.shard
        self._without_bias: set[str] = set()  # shares of sums, to which another rank adds it
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
        return self._linear(names, bias, may_round=True)

    def _linear(self, names: Sequence[str], bias: bool, *, may_round: bool) -> Linear:
        groups = mergeable(self._checkpoint, names)
        parts = [self._pack(how, group, bias, may_round=may_round) for how, group in groups]
        return parts[0] if len(parts) == 1 else SideBySide(parts)

    def _pack(self, how: LinearType, names: Sequence[str], bias: bool, *, may_round: bool) -> Linear:
        adds_bias = self._without_bias.isdisjoint(names)
        bias = bias and adds_bias
        if how == "FLOAT":
            weight = self._checkpoint.take(*(f"{name}.weight" for name in names), dtype=self._dtype)
            biases = (
                self._checkpoint.take(*(f"{name}.bias" for name in names), dtype=self._dtype)
                if bias
                else None
            )
            linear = self._platform.pack_linear(weight, biases, may_round=may_round)
        else:
            given = take_quantised(self._checkpoint, how, names, bias)
            if isinstance(given, W8A8Static) and not adds_bias:
                given = replace(given, quant_bias=torch.zeros_like(given.quant_bias))
            linear = self._platform.pack_quantised(given, self._dtype)
        self._release()
        return linear

    # -- the vocabulary: each rank has its part of the rows ------------------------------------------

    def head(self, module: str) -> Linear:
        """[R, hidden] -> [R, vocab]."""
        self._divide_rows(module)
        return self._joined(self._linear([module], bias=False, may_round=False))

    def embedding(self, module: str) -> Lookup:
        rows = self._divide_rows(module)
        weight = self.plain(module)
        return self._divided(lambda ids: functional.embedding(ids, weight), rows)

    def tied(self, module: str) -> tuple[Linear, Lookup]:
        """The head that is the embedding too, and the embedding."""
        rows = self._divide_rows(module)
        weight = self._checkpoint.take(f"{module}.weight", dtype=self._dtype)
        head, lookup = self._platform.pack_tied(weight)
        self._release()
        return self._joined(head), self._divided(lookup, rows)

    def _divide_rows(self, module: str) -> slice:
        rows = self.shard.part(self._checkpoint.stored_shape(f"{module}.weight")[0])
        self._checkpoint.read_only(module, outputs=rows)
        return rows

    def _joined(self, head: Linear) -> Linear:
        return head if self.shard.size == 1 else JoinedLinear(head, self.group)

    def _divided(self, lookup: Lookup, rows: slice) -> Lookup:
        return lookup if self.shard.size == 1 else DividedLookup(lookup, rows, self.group)

    # -- layers open to LoRA adapters; each notes where its projections end up -------------------------

    def adapted(self, prefix: str, *modules: str, bias: bool = False) -> AdaptedLinear:
        """As `linear`: whole on every rank, from whole inputs to whole outputs."""
        return self._adapted([f"{prefix}{module}" for module in modules], bias)

    def column_parallel(
        self, prefix: str, *modules: str, bias: bool = False, units: Sequence[int] = ()
    ) -> AdaptedLinear:
        """From whole inputs to this rank's outputs of each module, side by side.

        `units`: of each module, how many parts its outputs have that may not be cut (heads); (): no matter.
        """
        names = [f"{prefix}{module}" for module in modules]
        for name, count in zip(names, units or (None,) * len(names), strict=True):
            length = self._checkpoint.stored_shape(f"{name}.weight")[0]
            self._checkpoint.read_only(name, outputs=self.shard.part(length, count))
        return self._adapted(names, bias)

    def row_parallel(
        self, prefix: str, module: str, *, bias: bool = False, units: int | None = None, whole: bool = True
    ) -> Linear:
        """From this rank's inputs, as a column-parallel layer of equal `units` gives them, to whole outputs.

        `whole`: False leaves the result this rank's share of a sum: for who adds several up first and calls
        `group.sum` once.
        """
        name = f"{prefix}{module}"
        length = self._checkpoint.stored_shape(f"{name}.weight")[1]
        self._checkpoint.read_only(name, inputs=self.shard.part(length, units))
        if not self.shard.leads:
            self._without_bias.add(name)
        layer = self._adapted([name], bias)
        return SummedLinear(layer, self.group) if whole and self.shard.size > 1 else layer

    def expert(self, prefix: str, gate: str, up: str, down: str) -> tuple[Linear, Linear]:
        """Of an expert's MLP this rank's share: gate and up merged, and down, whose results are to be summed.

        As column-parallel and row-parallel layers of the ranks that have this expert; closed to adapters.
        """
        own = self.shard.within_expert
        for name in (gate, up):
            length = self._checkpoint.stored_shape(f"{prefix}{name}.weight")[0]
            self._checkpoint.read_only(f"{prefix}{name}", outputs=own.part(length))
        length = self._checkpoint.stored_shape(f"{prefix}{down}.weight")[1]
        self._checkpoint.read_only(f"{prefix}{down}", inputs=own.part(length))
        return self.linear(prefix, gate, up), self.linear(prefix, down)

    def heads_of(self, module: str, heads: int) -> Tensor:
        """The weight of a layer that is taken apart, of this rank's share of its `heads`, as `floating`."""
        length = self._checkpoint.stored_shape(f"{module}.weight")[0]
        self._checkpoint.read_only(module, outputs=self.shard.part(length, heads))
        return self.floating(module)

    def _adapted(self, names: Sequence[str], bias: bool) -> AdaptedLinear:
        layer = AdaptedLinear(self.linear("", *names, bias=bias), self.step_adapters)
        start = 0
        for name in names:
            rows, columns = self._checkpoint.stored_shape(f"{name}.weight")
            own_outputs, own_inputs = self._checkpoint.cuts(f"{name}.weight")
            end = start + self._checkpoint.shape(f"{name}.weight")[0]
            self.projections[name] = Projection(
                layer, slice(start, end), columns, rows, own_inputs, own_outputs
            )
            start = end
        return layer
