"""The device, or the reason why there is none."""

from __future__ import annotations

import importlib.util

import pytest

from engine.errors import StartupError
from worker.platforms.npu import NpuPlatform


@pytest.fixture(scope="session")
def platform() -> NpuPlatform:
    """With device 0 claimed."""
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    platform = NpuPlatform()
    try:
        platform.set_up(device_id=0, num_workers=1, threads=0)
    except StartupError as error:
        pytest.skip(str(error))
    return platform
