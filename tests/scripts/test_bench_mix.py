"""scripts/bench_mix.py: which gap belongs to which time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_mix")


def test_a_gap_belongs_to_the_arrival_it_overlaps() -> None:
    stream = bench.Answer(0.0, frames=[0.0, 1.0, 2.0, 4.0, 7.0, 8.0, 9.5])
    other = bench.Answer(0.0, frames=[3.0, 5.0])
    long = [bench.Answer(2.5, frames=[6.0])]
    gaps = bench.sort_gaps([stream, other], long, begun=1.0, ended=9.0)
    assert gaps.steady == [1.0, 1.0]  # what came before or after the measured time counts for nothing
    assert gaps.arrival == [2.0, 3.0, 2.0]
    assert gaps.figures() == pytest.approx(
        {
            "steady_p50_ms": 1000,
            "arrival_p50_ms": 2000,
            "arrival_p99_ms": 3000,
            "p99_ratio": 3,
            "long_ttft_ms": 3500,
        }
    )
