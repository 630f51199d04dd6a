"""The comparison of a family with the generic adapter: both ways run, and the table holds every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import profile_generic
from scripts.write_random_model import Shape, write_model
from worker.models.table import MODELS

SHAPE = Shape("qwen2", layers=1, hidden=64, heads=4, kv_heads=2, intermediate=96, vocab=600, tied=True)


def test_every_step_is_measured_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "small"
    write_model(SHAPE, model)
    argv = ["--model", str(model), "--batch", "1,3", "--context", "20", "--prefill", "40", "--turns", "2"]
    assert profile_generic.main([*argv, "--threads", str(torch.get_num_threads())]) == 0
    assert "Qwen2ForCausalLM" in MODELS
    head, _, columns, *rows = capsys.readouterr().out.splitlines()
    assert "small, bfloat16" in head and "own / generic" in columns
    assert [row[:14].strip() for row in rows] == ["decode 1", "decode 3", "prefill 40"]
    for row in rows:
        own, generic, ratio = (float(cell.replace(",", "")) for cell in row[14:].split())
        assert own > 0 and generic > 0
        assert ratio == pytest.approx(own / generic, rel=0.05, abs=0.01)


def test_a_model_without_a_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert profile_generic.main(["--model", str(tmp_path)]) == 2
    assert "no family of its own" in capsys.readouterr().err
