"""scripts/bench_prefix.py against the shipped model."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import TINY_MODEL

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_prefix")


def test_it_tells_how_much_sooner(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--model", str(TINY_MODEL), "--repeats", "1", "--shared", "128", "--own", "3"]) == 0
    assert re.search(r"cold \d+\.\d ms, warm \d+\.\d ms, \d+\.\d times sooner", capsys.readouterr().out)
