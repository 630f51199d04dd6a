"""scripts/bench_parallel.py: what steps say to ranks, and the table of the runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_parallel")


def test_every_step_arrives_as_it_was_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--ranks", "", "--repeats", "2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == list(bench.STEPS)
    sizes = [int(row[1]) for row in rows]
    # a decoding row: three numbers of its token, two of its length, its blocks; a prompt's token: three
    assert 32 * 4 * (3 + 2 + 8) < sizes[1] < 32 * 4 * (3 + 2 + 8 + 8)
    assert 3 * 4 * 4096 < sizes[3] < 4 * 4 * 4096


def test_work_is_compared_with_the_fewest_ranks() -> None:
    table = bench.ranks_table({1: bench.Run(5.0, [4.0], 100.0), 2: bench.Run(6.0, [2.5, 2.0], 150.0)})
    assert table.splitlines()[2:] == [
        "| 1 | 5.0 | 4.0 | 1.00 | 100 | 1.00 | 1.00 |",
        "| 2 | 6.0 | 2.5, 2.0 | 1.12 | 150 | 1.50 | 1.60 |",
    ]
