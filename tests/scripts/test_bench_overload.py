"""The benchmark of overload: what it counts of raw answers, and one tiny run against a daemon."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_overload")

SERVED = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\ncontent-length: 2\r\n\r\n{}"
UNTOLD = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}"


def test_answers_are_told_apart() -> None:
    outcome = bench.Outcome(wall_s=2.0)
    bench.note(outcome, [(0.5, SERVED), (0.002, REFUSED), (0.004, REFUSED), (0.1, UNTOLD), (0.1, b"junk")])
    assert (outcome.accepted, outcome.refused_s, dict(outcome.retry_after_s)) == (1, [0.002, 0.004], {7: 2})
    assert dict(outcome.others) == {503: 1, 0: 1}, "a refusal without Retry-After is none of ours"
    found = bench.figures(bench.Outcome(wall_s=1.0, accepted=1), outcome)
    assert found["kept"] == 0.5 and found["refusal_median_ms"] == pytest.approx(3.0)
    assert (found["refused"], found["others"]) == (2.0, 2.0)


def test_nothing_refused_is_no_overload() -> None:
    with pytest.raises(ValueError, match="1 requests served at 1x, 0 refused"):
        bench.figures(bench.Outcome(wall_s=1.0, accepted=1), bench.Outcome(wall_s=1.0, accepted=9))


def test_it_measures_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    argv = ["--mock", "--max-link-num", "2", "--output-len", "300", "--seconds", "0.5", "--json", str(out)]
    assert bench.main(argv) == 0, capsys.readouterr().err
    document = json.loads(out.read_text())
    assert document["figures"]["refused"] == sum(document["retry_after_s"].values()) > 0
    assert document["figures"]["others"] == 0, "everything was served or refused as it should be"
    assert all(1 <= int(seconds) <= 60 for seconds in document["retry_after_s"])
    shown = capsys.readouterr().out
    assert "accepted work" in shown and "Retry-After" in shown
