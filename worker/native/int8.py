"""Linear layers of int8 weights and activations through the compiled kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from worker.layers.quantized import W8A8Dynamic, W8A8Static
from worker.native.layout import dense_from_panels, to_panels
from worker.native.library import IS_BF16, WEIGHTS_S8, Kernels, LinearStruct

_GROUP = 4  # inputs that lie together
_SHIFT = 128  # added to inputs, which the processor's instruction takes without a sign


class NativeInt8Linear:
    """Its twins are W8A8Linear and W8A8StaticLinear, to the bit."""

    def __init__(self, given: W8A8Dynamic | W8A8Static, kernels: Kernels) -> None:
        """The caller drops the weight."""
        self.out_features, self.in_features = given.weight.shape
        self._data = to_panels(given.weight, _GROUP, kernels.int8_inputs)
        self._correction = given.weight.sum(1, dtype=torch.int32) * -_SHIFT
        self._struct = struct = LinearStruct(
            weight=self._data.data_ptr(),
            correction=self._correction.data_ptr(),
            in_features=self.in_features,
            out_features=self.out_features,
            weights=WEIGHTS_S8,
        )
        if isinstance(given, W8A8Static):
            self._correction += given.quant_bias
            self._scale, self._bias = given.deq_scale.contiguous(), None
            struct.input_scale, struct.input_offset = given.input_scale, given.input_offset
        else:
            self._scale = given.scale.contiguous()
            self._bias = None if given.bias is None else given.bias.contiguous()
            struct.bias = None if self._bias is None else self._bias.data_ptr()
        struct.scale = self._scale.data_ptr()
        self._address = ctypes.addressof(struct)
        self._run = kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: float32 or bfloat16 [rows, in] -> [rows, out]. A row with an infinity or a NaN becomes NaN."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        y = x.new_empty((rows, self.out_features))
        if self._run(self._address, x.data_ptr(), x.stride(0), y.data_ptr(), rows, IS_BF16[x.dtype]):
            raise MemoryError
        return y

    def dense(self) -> Tensor:
        """A copy of the weight as it was, int8 [out, in]."""
        return dense_from_panels(self._data, self.out_features, self.in_features)
