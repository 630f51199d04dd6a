"""Layers of which each rank holds a part, and what makes their results whole."""

from __future__ import annotations

from torch import Tensor

from worker.parallel import ParallelGroup
from worker.platforms.base import Linear, Lookup


class SummedLinear:
    """A layer whose inputs are divided: each rank multiplies its own, and the products are added up."""

    def __init__(self, own: Linear, group: ParallelGroup) -> None:
        self._own = own
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, this rank's inputs] -> [rows, out]."""
        return self._group.sum(self._own(x))


class JoinedLinear:
    """A layer whose outputs are divided and wanted whole: the vocabulary head."""

    def __init__(self, own: Linear, group: ParallelGroup) -> None:
        self._own = own
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out of all ranks]."""
        return self._group.join_columns(self._own(x))


class DividedLookup:
    """An embedding of which each rank has the rows of its part of the vocabulary."""

    def __init__(self, own: Lookup, rows: slice, group: ParallelGroup) -> None:
        """`own` takes 0 for the first of `rows`."""
        self._own = own
        self._rows = rows
        self._group = group

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: int [T] -> [T, hidden], exact: all but one rank add zeros."""
        last = self._rows.stop - self._rows.start - 1
        places = ids - self._rows.start
        others = (places < 0) | (places > last)
        return self._group.sum(self._own(places.clamp(0, last)).masked_fill(others[:, None], 0.0))
