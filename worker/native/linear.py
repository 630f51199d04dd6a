"""Linear layers of float32 or bfloat16 weights through the compiled kernel."""

from __future__ import annotations

import ctypes

from torch import Tensor

from worker.native.layout import dense_from_panels, rows_of_panels, to_panels
from worker.native.library import (
    IS_BF16,
    WEIGHTS_BF16,
    WEIGHTS_BF16_DOT,
    WEIGHTS_F32,
    Kernels,
    LinearStruct,
)


class NativeLinear:
    """A product with a weight in panels, which the caller drops. Its twin is PlainLinear.

    A row's bits depend on that row alone: every result is summed up in the order of the inputs, whatever the
    number of rows or threads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels, dot: bool = False) -> None:
        """weight: [out, in]; bias: [out] of the same dtype. `dot`: bfloat16 by the processor's dot product,
        where `kernels` has it, instead of in float32.
        """
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._is_bf16 = is_bf16 = IS_BF16[weight.dtype]
        self._data = to_panels(weight, 2, kernels.bf16_inputs) if is_bf16 else to_panels(weight, 1, 1)
        self._bias = None if bias is None else bias.float()
        self._struct = LinearStruct(
            weight=self._data.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            weights=(WEIGHTS_BF16_DOT if dot else WEIGHTS_BF16) if is_bf16 else WEIGHTS_F32,
        )
        self._address = ctypes.addressof(self._struct)
        self._run = kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in], in the weight's dtype -> [rows, out]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        y = x.new_empty((rows, self.out_features))
        if self._run(self._address, x.data_ptr(), x.stride(0), y.data_ptr(), rows, self._is_bf16):
            raise MemoryError
        return y

    def dense(self) -> Tensor:
        """A copy of the weight as it was, [out, in]."""
        return dense_from_panels(self._data, self.out_features, self.in_features)

    def rows(self, outputs: Tensor) -> Tensor:
        """Rows of the weight: int [n] -> [n, in]. What a tied embedding is."""
        return rows_of_panels(self._data, outputs, self.in_features)
