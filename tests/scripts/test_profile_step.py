"""The step profile: the real loop on a small random model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


script = _load("profile_step")
random_model = _load("write_random_model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("profile") / "tiny64"
    random_model.write_model(random_model.SHAPES["tiny64"], out)
    return out


@pytest.fixture(scope="module")
def threads() -> str:
    """As many as there are: torch's setting belongs to the whole process."""
    return str(torch.get_num_threads())


def test_every_batch_size_is_split_into_parts(
    model: Path, threads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    argv = ["--model", str(model), "--batch", "1,5", "--context", "20", "--steps", "6", "--block-size", "16"]
    assert script.main([*argv, "--threads", threads, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["median_ms"]) == ["1", "5"]
    for ms in report["median_ms"].values():
        assert set(ms) == {*script.PARTS, "step", "prefill"}
        assert all(ms[part] > 0 for part in ("plan", "tensors", "forward", "sample", "publish", "prefill"))
        assert ms["forward"] < ms["step"]
    shown = capsys.readouterr().out
    assert all(part in shown for part in script.PARTS)


def test_two_models_are_compared_in_turn(
    model: Path, threads: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []

    def load(path: Path, *rest: Any) -> Any:
        loaded.append(path)
        return load_runner(path, *rest)

    load_runner = script.load_runner
    monkeypatch.setattr(script, "load_runner", load)
    argv = ["--model", str(model), "--against", str(model), "--batch", "1,3", "--context", "20"]
    assert script.main([*argv, "--steps", "3", "--turns", "2", "--threads", threads]) == 0
    assert loaded == [model, model]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[:2] for row in rows] == [["decode", "1"], ["prefill", "1"], ["decode", "3"], ["prefill", "3"]]
    for row in rows:
        first, second, ratio = map(float, row[2:])
        # the figures are rounded to a hundredth
        assert ratio == pytest.approx(first / second, rel=0.05) and second > 0


@pytest.mark.parametrize("batch", [1, 40])
def test_only_full_decode_steps_count(model: Path, threads: str, batch: int) -> None:
    """40 sequences of 60 tokens take two prefill steps."""
    limits = script.schedule_settings(batch, 60, 5, 16)
    runner = script.load_runner(model, limits, int(threads), "auto")
    with script.make_ends() as ends:
        decodes, prefills = script.profile(runner, ends, limits, 60, 5, seed=0)
    assert len(decodes) == 5
    assert len(prefills) == -(-batch * 60 // script.PREFILL_TOKENS)
    assert all(set(times) == {*script.PARTS, "processor"} for times in decodes)


def test_a_context_longer_than_the_model_is_refused(
    model: Path, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(model), "--batch", "1", "--context", "9000", "--threads", threads]
    assert script.main(argv) == 2
    assert "8192" in capsys.readouterr().err


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", str(tmp_path), "--threads", str(torch.get_num_threads())]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_table_gives_shares_of_the_step() -> None:
    ms = dict.fromkeys(script.PARTS, 0.5) | {"forward": 4.5, "step": 8.0}
    lines = [line.split() for line in script.table({1: ms, 8: ms}).splitlines()]
    assert lines[0] == ["batch", "1", "8"]
    assert ["forward", "4.500", "56.2", "4.500", "56.2"] in lines
    assert lines[-1] == ["step", "8.000", "100.0", "8.000", "100.0"]
