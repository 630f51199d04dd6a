"""Linear layers as the CPU runs them: plain, packed for oneDNN, in float32 for many rows, or in tiles."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


class PlainLinear:
    """weight: [out, in]; bias: [out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        return functional.linear(x, self._weight, self.bias)

    def dense(self) -> Tensor:
        """[out, in], not to be changed."""
        return self._weight


class PackedLinear:
    """The same product on a weight repacked into oneDNN's blocked layout; the caller drops the original.

    Measured on a 0.5B model in bfloat16: 1.35x at 1 and 8 rows, 1.2x at 32, nothing lost at 512.

    oneDNN makes and keeps a kernel per shape: 1 to 3 ms and half a MiB for each number of rows, which made a
    worker grow by 24 MiB an hour under mixed load. So rows are filled up to few numbers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # the operators are private to torch: the platform probes them before it builds any layer
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        result: Tensor = self._run(fill_up(x), self._weight, self.bias, "none", [], "")
        return result[: x.shape[0]]

    def dense(self) -> Tensor:
        """A copy of the weight as it was, [out, in]."""
        weight: Tensor = self._weight.to_dense()
        return weight


_ROWS_HINT = 8  # expected rows; 8 and 512 give the same layout


def fill_up(x: Tensor) -> Tensor:
    """x: [rows, in], with rows of zeros behind it up to `filled_rows`."""
    missing = filled_rows(x.shape[0]) - x.shape[0]
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


def filled_rows(rows: int) -> int:
    """The number of rows a kernel is made for: `rows` up to 16, then the next of eight per power of two."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


class Scratch:
    """Room for one weight in `dtype`, shared by all layers: fresh buffers this large are page-faulted in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype)

    def hold(self, weight: Tensor) -> Tensor:
        """A copy of `weight` in this dtype, valid until the next call."""
        if weight.numel() > len(self._buffer):
            self._buffer = torch.empty(weight.numel(), dtype=self.dtype)
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


class Float32Scratch(Scratch):
    def __init__(self) -> None:
        super().__init__(torch.float32)


class UpcastingLinear:
    """Few rows through `narrow`, many in float32: for machines whose bfloat16 product runs at half the rate.

    The conversion costs as much as about 100 rows; measured without AMX 1.9x at 512 rows. Both add products
    of bfloat16 numbers up in float32 and round once, but in another order: about one result in ten thousand
    rounds the other way. `split_plan` keeps a row's batch mates from deciding which of the two it meets.
    """

    MIN_ROWS = 256

    def __init__(self, narrow: PlainLinear | PackedLinear, scratch: Float32Scratch) -> None:
        self._narrow = narrow
        self._scratch = scratch
        self._bias = None if narrow.bias is None else narrow.bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        if len(x) < self.MIN_ROWS:
            return self._narrow(x)
        return functional.linear(x.float(), self._scratch.hold(self._narrow.dense()), self._bias).to(x.dtype)


class StepArithmetic:
    """Shared by all linear layers of a platform; whoever runs a step sets it."""

    __slots__ = ("invariant",)

    def __init__(self) -> None:
        self.invariant = False  # whether a row's result must not depend on the number of rows


class InvariantLinear:
    """`fast`, or while the step asks for it `narrow` on numbers of rows that all give a row the same bits."""

    def __init__(
        self,
        fast: Callable[[Tensor], Tensor],
        narrow: Callable[[Tensor], Tensor],
        sizes: tuple[int, ...],
        step: StepArithmetic,
    ) -> None:
        """`sizes`: rising, of worker/platforms/row_sizes.py."""
        self.fast = fast
        self._narrow = narrow
        self._sizes = sizes
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        if not self._step.invariant:
            return self.fast(x)
        largest = self._sizes[-1]
        if x.shape[0] <= largest:
            return self._tile(x)
        return torch.cat([self._tile(tile) for tile in torch.split(x, largest)])

    def _tile(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        missing = self._sizes[bisect_left(self._sizes, rows)] - rows
        if missing:
            return self._narrow(functional.pad(x, (0, 0, 0, missing)))[:rows]
        # some products follow the alignment of their operands
        return self._narrow(x.clone() if x.data_ptr() % _ALIGNMENT else x)


_ALIGNMENT = 64  # bytes; torch's own on the CPU
