"""Where the stand-in is kept, and the environment of a process that shall have it."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from npu_stand_in.libraries import build_libraries, find_libraries
from npu_stand_in.loading import LIBRARIES
from npu_stand_in.wheel import fetch_wheel, find_wheel

ARITHMETIC = "NPU_SIM_ARITHMETIC"  # "0": operators only count their launches
_SITE = Path(__file__).resolve().parent / "site"


def default_home() -> Path:
    """In the environment of the Python that runs, as other things that were built for it."""
    return Path(os.environ.get("NPU_SIM_HOME") or Path(sys.prefix) / "cache" / "npu_sim")


@dataclass(frozen=True, slots=True)
class StandIn:
    wheel: Path
    libraries: Path

    @classmethod
    def find(cls, home: Path) -> StandIn:
        """The one that has been built. Raises Unavailable."""
        wheel = find_wheel(home)
        return cls(wheel, find_libraries(home, wheel))

    @classmethod
    def build(cls, home: Path) -> StandIn:
        """Fetch and build what is missing; of two processes at it the second waits. Raises Unavailable."""
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wheel = fetch_wheel(home)
            return cls(wheel, build_libraries(home, wheel))

    def environ(
        self,
        base: Mapping[str, str],
        *,
        devices: int = 2,
        memory_mib: int = 1024,
        chip: str = "Ascend910B1",
        arithmetic: bool = True,
    ) -> dict[str, str]:
        """`base` for a Python process that has `devices` simulated NPUs with `memory_mib` each.

        Without `arithmetic` operators compute nothing: they count their launches, and results stay NaN.
        """
        path = [str(_SITE), str(self.wheel), *filter(None, base.get("PYTHONPATH", "").split(os.pathsep))]
        return {
            **base,
            "PYTHONPATH": os.pathsep.join(path),
            LIBRARIES: str(self.libraries),
            ARITHMETIC: "1" if arithmetic else "0",
            "NPU_SIM_DEVICES": str(devices),
            "NPU_SIM_MEMORY_MIB": str(memory_mib),
            "NPU_SIM_SOC": chip,
            # torch would import torch_npu with itself, in every process
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # launches happen inside the calls that make them, and so do their errors
            "TASK_QUEUE_ENABLE": "0",
        }
