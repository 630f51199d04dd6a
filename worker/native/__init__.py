"""Kernels in C++ where torch leaves a measured factor on the table, each with a twin out of torch operators.

The twins are what the tests compare with, and what computes where nothing is compiled (build.py).
"""

from worker.native.int8 import PackedInt8, pack_w8a8, w8a8_linear
from worker.native.library import Kernels, kernels
from worker.native.linear import NativeLinear

__all__ = ["Kernels", "NativeLinear", "PackedInt8", "kernels", "pack_w8a8", "w8a8_linear"]
