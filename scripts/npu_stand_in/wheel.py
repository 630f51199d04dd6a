"""torch_npu without its dependencies, in a folder of its own.

Installed beside torch it would break `import torch` where CANN is not: torch loads such packages by itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from npu_stand_in.unavailable import Unavailable

VERSION = "2.13.0"  # the release that goes with the torch of constraints.txt


def find_wheel(home: Path) -> Path:
    """The folder that holds the package `torch_npu`. Raises Unavailable."""
    _check_torch()
    folder = _folder(home)
    if not folder.is_dir():
        raise Unavailable(
            f"torch_npu {VERSION} is not in {folder}; `python scripts/npu_sim.py build` fetches it"
        )
    return folder


def fetch_wheel(home: Path) -> Path:
    """As `find_wheel`, having downloaded it (44 MB) where it was not there. Raises Unavailable."""
    _check_torch()
    folder = _folder(home)
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1",
        "--no-deps", "--only-binary=:all:", "--target", str(unfinished), f"torch_npu=={VERSION}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise Unavailable(
            f"torch_npu {VERSION} could not be had: {said[-1].removeprefix('ERROR: ')}; it has wheels for "
            "Python 3.10 to 3.13 on x86_64 and aarch64, PIP_INDEX_URL names another registry"
        )
    unfinished.rename(folder)
    return folder


def _folder(home: Path) -> Path:
    return home / f"torch_npu-{VERSION}-cp{sys.version_info.major}{sys.version_info.minor}"


def _check_torch() -> None:
    try:
        found = version("torch").partition("+")[0]
    except PackageNotFoundError:
        raise Unavailable(
            "torch is not installed here; scripts/test.sh makes an environment with it"
        ) from None
    if found.split(".")[:2] != VERSION.split(".")[:2]:
        raise Unavailable(
            f"torch_npu {VERSION} wants torch {VERSION}, and torch is {found}; see constraints.txt"
        )
