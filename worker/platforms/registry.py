"""Device type -> platform. Adding one is a module and a row; nothing is imported before it is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

from engine.errors import EXIT_INIT, StartupError
from worker.platforms.base import Platform

log = logging.getLogger("llm.platform")

PLATFORMS: dict[str, tuple[str, str]] = {
    "cpu": ("worker.platforms.cpu", "CpuPlatform"),
    "npu": ("worker.platforms.npu", "NpuPlatform"),
}


def _npu_missing() -> str | None:
    if importlib.util.find_spec("torch_npu") is None:
        return "package torch_npu is not installed; it must be of torch's version: see docs/npu.md"
    return None


def _cuda_missing() -> str | None:
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is visible"


# in the order "auto" tries them; each says what is missing, or None
_ACCELERATORS: dict[str, Callable[[], str | None]] = {"npu": _npu_missing, "cuda": _cuda_missing}
# what a driver has in /dev; "auto" leaves a device alone whose package is there and whose driver is not
_NODES = {"npu": "davinci[0-9]*"}


def _has_driver(name: str) -> bool:
    return name not in _NODES or any(Path("/dev").glob(_NODES[name]))


def _best_platform() -> str:
    """The first accelerator that is there and known; else the CPU, with a warning when one lies idle."""
    usable = [name for name, missing in _ACCELERATORS.items() if missing() is None and _has_driver(name)]
    known = [name for name in usable if name in PLATFORMS]
    if usable and not known:
        log.warning(
            "deviceType 'auto': %s is usable here, but not supported by this build yet; serving on the CPU",
            " and ".join(usable),
        )
    return known[0] if known else "cpu"


def select_platform(device_type: str) -> Platform:
    """The platform for `deviceType`; StartupError when one is named that cannot be used."""
    if device_type == "auto":
        device_type = _best_platform()
    else:
        reason = _ACCELERATORS[device_type]() if device_type in _ACCELERATORS else None
        faults = [] if device_type in PLATFORMS else [f"{device_type} is not supported by this build yet"]
        faults += [] if reason is None else [reason]
        if faults:
            raise StartupError(f"deviceType {device_type!r}: {'; '.join(faults)}", EXIT_INIT)
    module, name = PLATFORMS[device_type]
    platform: Platform = getattr(importlib.import_module(module), name)()
    return platform
