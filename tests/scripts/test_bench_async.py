"""scripts/bench_async.py against the shipped model."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import TINY_MODEL

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_async")


def test_both_ways_are_measured_in_turn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--batch", "1,3", "--context", "8", "--steps", "4", "--turns", "2", "--threads", "1"]
    assert bench.main(["--model", str(TINY_MODEL), *arguments, "--json", str(report)]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^ +([13])  (in turn|overlapped) +(\S+) +(\S+) +(\S+) +(\S+)$", told, re.MULTILINE)
    assert [row[:2] for row in rows] == [(size, way) for size in ("1", "3") for way in bench.WAYS]
    assert all(float(number) > 0 for row in rows for number in row[2:])
    assert [row[-1] for row in rows[::2]] == ["1.000"] * 2
    assert json.loads(report.read_text())["tokens_per_s"].keys() == {"1", "3"}


def test_more_steps_than_the_ring_holds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--steps", "250"])
    assert "--steps 250: at most" in capsys.readouterr().err


def test_the_middle_of_the_turns_counts() -> None:
    turns = [bench.Turn(speed, 10 / speed, 1 / speed) for speed in (1, 5, 2)]
    assert bench.median_turn(turns) == bench.Turn(2, 5.0, 0.5)
