"""Device type -> platform. Adding one is a module and a row; nothing is imported before it is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EXIT_INIT, StartupError
from worker.platforms.base import Platform
from worker.platforms.cuda_start import find_gpu

log = logging.getLogger("llm.platform")

PLATFORMS: dict[str, tuple[str, str]] = {
    "cpu": ("worker.platforms.cpu", "CpuPlatform"),
    "npu": ("worker.platforms.npu", "NpuPlatform"),
    "cuda": ("worker.platforms.cuda", "CudaPlatform"),
}


def _npu_missing() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "package torch_npu is not installed; it must be of torch's version: see docs/npu.md"
    return None


def _cuda_missing() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; see docs/cuda.md"
    if importlib.util.find_spec("triton") is None:
        return "package triton is not installed; torch's own wheels for Linux bring it"
    return None


@dataclass(frozen=True, slots=True)
class _Accelerator:
    nodes: tuple[str, ...]  # what its driver has in /dev, any of them
    missing: Callable[[], str | None]  # what of our software, or None


# in the order "auto" tries them
_ACCELERATORS: dict[str, _Accelerator] = {
    "npu": _Accelerator(("davinci[0-9]*",), _npu_missing),
    "cuda": _Accelerator(("nvidia[0-9]*", "dxg"), _cuda_missing),
}


def _best_platform() -> str:
    """The first accelerator that is there and answers; else the CPU, with a warning when one lies idle.

    One whose package is installed and whose driver is not there is left alone without a word.
    """
    for name, accelerator in _ACCELERATORS.items():
        if not any(path for node in accelerator.nodes for path in Path("/dev").glob(node)):
            continue
        why = accelerator.missing() or _silence(name)
        if why is None:
            return name
        log.warning("deviceType 'auto': %s is not used: %s", name, why)
    return "cpu"


def _silence(name: str) -> str | None:
    """Why no device of this kind can be used; None: one can, or nobody knows before it is claimed."""
    if name != "cuda":
        return None
    try:
        find_gpu(0)
    except StartupError as error:
        return str(error)
    return None


def select_platform(device_type: str) -> Platform:
    """The platform for `deviceType`; StartupError when one is named that cannot be used."""
    if device_type == "auto":
        device_type = _best_platform()
    elif device_type in _ACCELERATORS:
        reason = _ACCELERATORS[device_type].missing()
        if reason is not None:
            raise StartupError(f"deviceType {device_type!r}: {reason}", EXIT_INIT)
    module, name = PLATFORMS[device_type]
    platform: Platform = getattr(importlib.import_module(module), name)()
    return platform
