"""The Triton kernels of deviceType cuda, interpreted on the CPU and compiled for chips that are not here.

README.md says what that proves. Each file has a process: within one, kernels are interpreted or compiled.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["attention", "layers", "model", "compiler"])
def test_kernels(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: there are no wheels for this machine")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
        "--timeout=0",  # the file as a whole has a limit
        str(Path(__file__).parent / f"checks_{name}.py"),
    ]  # fmt: skip
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_INTERPRET": "0" if name == "compiler" else "1",
    }
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


def test_a_server_on_the_cpu_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import worker.main, worker.attention.registry\n"
        "import worker.attention.triton_paged, worker.platforms.cuda_row_ops, worker.platforms.cuda_linears"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True, timeout=60)
