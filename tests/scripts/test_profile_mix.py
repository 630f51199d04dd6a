"""scripts/profile_mix.py against the shipped model."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import TINY_MODEL

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
profile: Any = importlib.import_module("profile_mix")


def test_pieces_of_a_given_size_cover_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        str(TINY_MODEL),
        "--streams",
        "2",
        "--short",
        "8",
        "--long",
        "80",
        "--chunk",
        "20",
    ]
    assert profile.main(arguments) == 0
    assert re.search(r"4 mixed steps of 20 to 20 tokens: p50 \d+\.\d\d, p99", capsys.readouterr().out)
