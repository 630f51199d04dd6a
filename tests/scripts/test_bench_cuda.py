"""scripts/bench_cuda.py as far as a CPU can try it: the loops run, and figures stand where they belong."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
script: Any = importlib.import_module("bench_cuda")
random_model: Any = importlib.import_module("write_random_model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("bench") / "llama-tiny"
    random_model.write_model(random_model.SHAPES["llama-tiny"], out)
    return out


def test_it_measures_steps_and_streams(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--batch", "1,3", "--context", "20", "--steps", "4", "--block-size", "16"]
    streams = ["--streams", "4", "--input-len", "8", "--output-len", "6", "--no-peer"]
    assert script.main(["--model", str(model), *options, *streams]) == 0
    out = capsys.readouterr().out
    assert re.search(r"llama-tiny, cpu, bandwidth \d+ GB/s; context 20", out)
    assert [line.split()[0] for line in re.findall(r"^ +\d+ .*$", out, re.MULTILINE)] == ["1", "3"]
    assert re.search(r"^4 streams: ours \d+ tok/s$", out, re.MULTILINE)


def test_a_gpu_that_is_not_there_is_told_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert script.main(["--model", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cannot measure: deviceType 'cuda': ")


def test_only_a_head_that_is_the_embedding_too_is_read(model: Path, tmp_path: Path) -> None:
    shape = random_model.SHAPES["llama-tiny"]
    assert script.looked_up_bytes(model, 2) == 2 * shape.vocab * shape.hidden
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "vocab_size": 9, "hidden_size": 4}')
    assert script.looked_up_bytes(tmp_path, 2) == 0


def test_ratios_are_of_the_floor_and_of_the_peer() -> None:
    assert script.steps_table([script.Step(64, 6.0, 4.0)]).splitlines()[1].split() == [
        "64", "6.00", "4.00", "1.50", "10666.7"
    ]  # fmt: skip
    line = script.throughput_line(256, {"ours": 900.0, "transformers": 300.0})
    assert line == "256 streams: ours 900 tok/s, transformers 300 tok/s, ratio 3.00"
