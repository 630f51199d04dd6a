"""Collectives over hccl between two processes, each with a device of its own.

Proves that what torch.distributed asks of HCCL is asked by every rank in the same order, that its results are
used, and that it may be captured. Does not prove anything about HCCL itself: ours adds in the order of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RANK = Path(__file__).parent / "level3_collectives.py"


@pytest.mark.slow
def test_two_ranks_sum_gather_and_send(stand_in: Any, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    environ = stand_in.environ({**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(tmp_path / "meeting")],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, text in zip(ranks, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("npu_sim_")}
