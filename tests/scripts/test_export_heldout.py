"""The export for AISBench: read by AISBench's own rules, the files hold the shipped problems."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "export_heldout.py"
GOOD = {"question": "2 and 3?", "answer": "2 + 3 = 5\n#### 5"}


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_heldout", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load()


def _lines(path: Path) -> list[dict[str, str]]:
    """As AISBench reads a split: one JSON object per line, no empty line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line.strip()) for line in lines]


def test_the_shipped_problems_in_the_layout_of_gsm8k(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path / "data")]) == 0
    folder = tmp_path / "data" / "ais_bench" / "datasets" / "gsm8k"
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert _lines(folder / "train.jsonl") == []
    problems = _lines(folder / "test.jsonl")
    assert problems == _lines(script.HELDOUT)
    assert len(problems) == 500
    for problem in problems:
        int(problem["answer"].split("#### ")[1].replace(",", ""))
    told = capsys.readouterr().out
    assert f"export AIS_BENCH_DATASETS_CACHE={tmp_path / 'data'}\n" in told


def test_again_replaces_what_was_there(tmp_path: Path) -> None:
    script.export([GOOD, GOOD, GOOD], tmp_path)
    folder = script.export([GOOD], tmp_path)
    assert _lines(folder / "test.jsonl") == [GOOD]


@pytest.mark.parametrize("gold", ["5", "-5", "1,234", "1234567", "5\n"])
def test_a_gold_number_aisbench_can_score(gold: str) -> None:
    problem = script.checked_record(json.dumps(GOOD | {"answer": f"so\n#### {gold}", "source": "dropped"}))
    assert problem.keys() == GOOD.keys()
    int(problem["answer"].split("#### ")[1].replace(",", ""))


@pytest.mark.parametrize(
    "answer",
    [
        "5",
        "#### ",
        "#### five",
        "####5",
        "#### 2.5",
        "#### 5 apples",
        "#### 5\n#### 6",
        "#### x #### 6",
        "#### 12,34",
    ],
)
def test_a_gold_number_aisbench_would_misread(answer: str) -> None:
    with pytest.raises(ValueError, match="must end in '#### N', once"):
        script.checked_record(json.dumps(GOOD | {"answer": answer}))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"answer": "#### 5"}', "question is None"),
        ('{"question": "  ", "answer": "#### 5"}', "question is '  '"),
        ('{"question": "2?", "answer": 5}', "answer is 5"),
        ("[]", "question is None"),
        ("{", "Expecting"),
    ],
)
def test_a_bad_line_is_told_by_number_and_writes_nothing(
    line: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "problems.jsonl"
    data.write_text(f"{json.dumps(GOOD)}\n\n{line}\n", encoding="utf-8")
    assert script.main(["--data", str(data), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"{data}, line 3: {named}" in told
    assert not (tmp_path / "out").exists()


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    problem = {"question": "two\u2028three?", "answer": "#### 5"}
    data = tmp_path / "problems.jsonl"
    data.write_text(json.dumps(problem, ensure_ascii=False) + "\n", encoding="utf-8")
    folder = script.export(script.read_problems(data), tmp_path)
    assert _lines(folder / "test.jsonl") == [problem]


@pytest.mark.parametrize("content", ["", "\n \n", None])
def test_nothing_to_export(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "problems.jsonl"
    if content is not None:
        data.write_text(content, encoding="utf-8")
    assert script.main(["--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert str(data) in capsys.readouterr().err
