"""The random adapter script from its command line; tests/worker/test_lora.py loads what it writes."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.harness import TINY_MODEL
from tests.lora_adapters import script


def names(out: Path) -> set[str]:
    with safe_open(out / script.WEIGHTS_FILE, framework="pt") as handle:
        return set(handle.keys())


def test_it_writes_a_directory_the_server_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    arguments = [
        "--model",
        str(TINY_MODEL),
        "--out",
        str(out),
        "--rank",
        "3",
        "--targets",
        "q_proj",
        "up_proj",
    ]
    assert script.main(arguments) == 0
    assert "rank 3" in capsys.readouterr().out
    assert json.loads((out / script.CONFIG_FILE).read_text())["r"] == 3
    layers = json.loads((TINY_MODEL / "config.json").read_text())["num_hidden_layers"]
    assert len(names(out)) == layers * 2 * 2
    assert all(".q_proj." in name or ".up_proj." in name for name in names(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


def test_it_replaces_nothing_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(TINY_MODEL), "--out", str(tmp_path / "a"), "--targets", "o_proj"]
    assert script.main(arguments) == 0
    before = (tmp_path / "a" / script.WEIGHTS_FILE).read_bytes()
    assert script.main([*arguments, "--seed", "1"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "a" / script.WEIGHTS_FILE).read_bytes() == before
    assert script.main([*arguments, "--seed", "1", "--force"]) == 0
    assert (tmp_path / "a" / script.WEIGHTS_FILE).read_bytes() != before


def test_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", str(tmp_path), "--out", str(tmp_path / "a")]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
