"""scripts/bench_peers.py and bench_speculation.py: which figure stands where, and which ratio is of what."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
peers: Any = importlib.import_module("bench_peers")
speculation: Any = importlib.import_module("bench_speculation")


def column(rate: float, ttft: float, **more: float) -> dict[str, Any]:
    return {"median": {"output_tok_s": rate, "ttft_ms_p50": ttft, **more}}


def test_ours_is_compared_with_the_best_peer_of_each_figure() -> None:
    row = {"bf16": column(30, 50), "int8": column(60, 20), "a": column(20, 100), "b": column(10, 40)}
    lines = peers.table({"c8": row}, ["bf16", "int8"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "", "bf16", "int8", "a", "b", "ours / best peer"]
    assert cells[2:] == [
        ["c8", "tok/s", "30.0", "60.0", "20.0", "10.0", "1.50"],
        ["c8", "TTFT p50 ms", "50", "20", "100", "40", "1.25"],
    ]


def test_without_a_peer_there_is_no_ratio() -> None:
    assert peers.table({"tiny64": {"bf16": column(8, 5)}}, ["bf16", "int8"]).splitlines()[-1].endswith("|  |")


def test_figures_taken_beside_other_work_are_told_apart() -> None:
    assert not peers.noisy({"c8": {"bf16": column(1, 1, other_cores=0.1), "a": column(1, 1)}})
    assert peers.noisy({"c8": {"bf16": column(1, 1, other_cores=0.2)}})


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1", "a=ftp://127.0.0.1", "=http://127.0.0.1:1"])
def test_a_peer_is_named_and_spoken_to_over_http(wrong: str) -> None:
    with pytest.raises(SystemExit):
        peers.parse_args(["--model", "m", "--peer", wrong])
    assert peers.parse_args(["--model", "m", "--peer", "a=http://h:1"]).peer == [("a", "http://h:1")]


def test_speculation_is_compared_with_the_same_model_without_it() -> None:
    (line,) = speculation.table("text", {8: {"without": column(40, 1), "with": column(60, 1)}})
    assert line == "| text | 8 | 40.0 | 60.0 | 1.50 |"
