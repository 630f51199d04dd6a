"""The stand-in that scripts/npu_sim.py has built, and processes on it; README.md says what they prove."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))
environment = importlib.import_module("npu_stand_in.environment")
unavailable = importlib.import_module("npu_stand_in.unavailable")

_LEVEL_TAKES_AT_MOST_S = 280.0  # some 20 on a machine with nothing else to do


@pytest.fixture(scope="session")
def stand_in() -> Any:
    """Skips where it has not been built; scripts/test.sh does that where gcc, nm and the wheel can be had."""
    try:
        return environment.StandIn.find(environment.default_home())
    except unavailable.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def run_level(stand_in: Any) -> Callable[..., None]:
    """Runs the tests of one file in a process of their own that has simulated NPUs, and shows its report."""

    def run(name: str, **options: Any) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
            "--timeout=0",  # the level as a whole has a limit
            # torch_npu warns of itself while it is imported
            "-o", "filterwarnings=ignore", str(Path(__file__).parent / name),
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=REPO,
            env=stand_in.environ(environ, **options),
            capture_output=True,
            text=True,
            timeout=_LEVEL_TAKES_AT_MOST_S,
        )
        assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"

    return run
