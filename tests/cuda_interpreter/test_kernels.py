"""The Triton kernels of deviceType cuda, computed on the CPU by Triton's interpreter; README.md says what
that proves. Each file in a process of its own: a process has Triton's kernels interpreted or compiled.
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
@pytest.mark.parametrize("name", ["attention", "layers"])
def test_kernels_in_the_interpreter(name: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: there are no wheels for this machine")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
        "--timeout=0",  # the file as a whole has a limit
        str(Path(__file__).parent / f"checks_{name}.py"),
    ]  # fmt: skip
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


def test_a_server_on_the_cpu_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import worker.main, worker.attention.registry\n"
        "import worker.attention.triton_paged, worker.platforms.cuda_row_ops, worker.platforms.cuda_linears"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True, timeout=60)
