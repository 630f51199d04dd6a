"""The comparison of compiled kernels with torch's: both ways run, and the table holds every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts import profile_kernels
from scripts.write_random_model import Shape, write_model
from worker.native import library

SHAPE = Shape("qwen2", layers=1, hidden=64, heads=4, kv_heads=2, intermediate=96, vocab=600, tied=True)


@pytest.mark.skipif(not library.all_kernels(), reason="no compiled kernels")
def test_every_step_is_measured_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small"
    write_model(SHAPE, model)
    before = library.all_kernels
    argv = ["--model", str(model), "--batch", "1,3", "--context", "20", "--prefill", "40", "--turns", "2"]
    assert profile_kernels.main([*argv, "--threads", str(torch.get_num_threads())]) == 0
    assert library.all_kernels is before
    head, _, columns, *rows = capsys.readouterr().out.splitlines()
    assert "small, bfloat16" in head and "GB/s" in head
    cells = [row.rsplit(maxsplit=len(row.split()) - 2) for row in rows]
    assert [name for name, *_ in cells] == ["decode 1", "decode 3", "prefill 40"]
    assert [len(numbers) for _, *numbers in cells] == [7, 7, 5]
    for _, ours, torchs, ratio, products, rest, *_ in cells:
        assert float(ours) > 0 and float(torchs) > 0 and float(products) > 0
        assert float(ratio) == pytest.approx(float(torchs) / float(ours), rel=0.2, abs=0.02)
        assert float(rest) == pytest.approx(float(ours) / float(products), rel=0.5, abs=0.05)
    assert "/ floor" in columns


def test_without_compiled_kernels_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "all_kernels", lambda: ())
    assert profile_kernels.main([]) == 2
    assert "worker/native/build.py" in capsys.readouterr().err
