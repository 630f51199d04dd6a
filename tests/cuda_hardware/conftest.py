"""The device, or the reason why there is none."""

from __future__ import annotations

import pytest

from engine.errors import StartupError
from worker.platforms.base import Platform
from worker.platforms.registry import select_platform


@pytest.fixture(scope="session")
def platform() -> Platform:
    """A CudaPlatform with device 0 claimed."""
    try:
        platform = select_platform("cuda")
        platform.set_up(device_id=0, num_workers=1, threads=0)
    except StartupError as error:
        pytest.skip(str(error))
    return platform
