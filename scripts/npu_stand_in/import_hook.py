"""`import torch_npu` on the stand-in: its libraries before it, the arithmetic after it."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from npu_stand_in.environment import ARITHMETIC
from npu_stand_in.loading import runtime


def install() -> None:
    """Have this process, and those it forks, find the stand-in at `import torch_npu`."""
    if not any(isinstance(finder, _TorchNpuFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchNpuFinder())


class _TorchNpuFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _TorchNpuLoader(spec.loader)
        return spec


class _TorchNpuLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        runtime()
        self._loader.exec_module(module)
        if os.environ.get(ARITHMETIC) == "1":
            from npu_stand_in.arithmetic import ReferenceArithmetic  # imports torch, as torch_npu did

            if threading.current_thread() is not threading.main_thread():
                raise ImportError("torch_npu: on the stand-in only the main thread computes; import it there")
            # until the process ends: the mode is this thread's
            ReferenceArithmetic().__enter__()
