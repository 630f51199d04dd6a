"""The benchmark of the API layer: its load generator against raw bytes, and one tiny run of everything."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
bench: Any = importlib.import_module("bench_api_layer")

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n0\r\n\r\nab"
CHUNKED = HEAD + b"5\r\ndata:\r\n4\r\nabcd\r\n0\r\n\r\n"


@given(st.sampled_from([WHOLE, CHUNKED]), st.lists(st.integers(1, 120), max_size=8))
def test_an_answer_ends_where_it_ends(raw: bytes, cuts: list[int]) -> None:
    """However the network cuts it, once its head came in one piece."""
    head = raw.index(b"\r\n\r\n") + 4
    at = [0, *sorted({head + cut for cut in cuts if head + cut < len(raw)}), len(raw)]
    client = bench.Client(None)
    pieces = [raw[a:b] for a, b in pairwise(at)]
    assert [client.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_answers_that_are_no_measure_are_refused() -> None:
    dialect = bench.DIALECTS["completions"]
    good = b"HTTP/1.1 200 OK\r\n\r\ndata: a\n\ndata: b\n\n"
    bench.check(bench.Load(1.0, [good]), dialect, 2)
    with pytest.raises(ValueError, match="2 frames instead of 3"):
        bench.check(bench.Load(1.0, [good]), dialect, 3)
    with pytest.raises(ValueError, match="not a 200"):
        bench.check(bench.Load(1.0, [b"HTTP/1.1 503 No\r\n\r\n"]), dialect, None)


def test_cost_is_processor_time_over_what_was_done() -> None:
    cpu = {"endpoint": 0.5, "workers": 0.2, "daemon": 0.0, "client": 0.1, "others": 0.0}
    found = bench.figures(bench.Load(2.0, [b""] * 10), cpu, tokens=5)
    assert (found["req_s"], found["tok_s"]) == (5.0, 25.0)
    assert found["endpoint_us_per_token"] == pytest.approx(10_000)
    assert found["endpoint_us_per_request"] == pytest.approx(50_000)
    assert (found["endpoint_cores"], found["workers_cores"]) == (0.25, 0.1)


def test_it_measures_every_dialect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    argv = [
        "--streams",
        "1,3",
        "--seconds",
        "0.02",
        "--repeats",
        "1",
        "--output-len",
        "3",
        "--json",
        str(out),
    ]
    assert bench.main(argv) == 0, capsys.readouterr().err
    results = json.loads(out.read_text())["results"]
    assert {(r["dialect"], r["mode"], r["streams"]) for r in results} == {
        (dialect, mode, streams)
        for dialect in bench.DIALECTS
        for mode in ("stream", "whole")
        for streams in (1, 3)
    }
    for result in results:
        assert result["median"]["requests"] >= result["streams"]
        assert result["median"]["req_s"] > 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * (1 + 2 * len(bench.DIALECTS))
    assert all(row.count("|") == rows[0].count("|") for row in rows[: len(rows) // 2])


def test_an_unknown_dialect_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(["--dialects", "chat,soap"])
    assert "no such dialect: soap" in capsys.readouterr().err
