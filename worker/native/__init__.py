"""Kernels in C++ where torch leaves a measured factor on the table, each with a twin out of torch operators.

The twins are what the tests compare with, and what computes where nothing is compiled (build.py).
"""

from worker.native.int8 import NativeInt8Linear
from worker.native.library import Kernels, kernels
from worker.native.linear import NativeLinear
from worker.native.row_ops import NativeRowOps

__all__ = ["Kernels", "NativeInt8Linear", "NativeLinear", "NativeRowOps", "kernels"]
