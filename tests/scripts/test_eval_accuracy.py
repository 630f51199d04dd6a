"""The accuracy script: how numbers are read, and a whole run against a fake server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "eval_accuracy.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


script = _load()


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("16 - 3 = 13\n#### 13", "13"),
        ("#### 1,234", "1234"),
        ("a #### 1 and then\n#### -7", "-7"),
        ("so\n#### $2.50", "2.5"),
    ],
)
def test_gold_answer(answer: str, gold: str) -> None:
    assert script.gold_answer(answer) == Decimal(gold)


@pytest.mark.parametrize("answer", ["13", "", "#### none", "#### "])
def test_gold_answer_needs_a_marked_number(answer: str) -> None:
    with pytest.raises(ValueError, match="no number"):
        script.gold_answer(answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = 13\n#### 13", "13"),
        ("#### 13\nThat was 2 steps.", "13"),
        ("The answer is 42.", "42"),
        ("She pays $1,250.75!", "1250.75"),
        ("16-3=13", "13"),
        ("It falls to -4", "-4"),
        ("It falls to -$4.", "-4"),
        ("10-4", "4"),
        ("first 5, then 6,", "6"),
        ("it is 7\n####", "7"),
        ("13.0", "13"),
    ],
)
def test_predicted_answer(text: str, number: str) -> None:
    assert script.predicted_answer(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "I do not know.", "####"])
def test_predicted_answer_without_a_number(text: str) -> None:
    assert script.predicted_answer(text) is None


def test_right_compares_values() -> None:
    assert script.Outcome("q", "13", "13.0", "", None).right
    assert not script.Outcome("q", "13", "31", "", None).right
    assert not script.Outcome("q", "13", None, "", "HTTP 500").right


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten problems whose answers are 0 to 9."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"What is {n}?", "answer": f"{n} = {n}\n#### {n}"}) for n in range(10)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_load_items(data: Path) -> None:
    assert [int(item.gold) for item in script.load_items(data)] == list(range(10))
    assert len(script.load_items(data, 3)) == 3


async def _fake_run(arguments: list[str], seen: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """Evaluate against a server that gets 3 wrong and fails on 7."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        seen.append(body)
        number = int(body["messages"][0]["content"].removeprefix("What is ").removesuffix("?"))
        if number == 7:
            return web.Response(status=503, text="busy")
        said = f"#### {number + (number == 3)}"
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": said}}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    async with TestServer(app) as server:
        args = script.parse_args([*arguments, "--url", str(server.make_url("/"))])
        result: tuple[str, list[Any]] = await script.evaluate(args, script.load_items(args.data, args.limit))
        return result


def test_evaluate(data: Path) -> None:
    seen: list[dict[str, Any]] = []
    model, outcomes = asyncio.run(_fake_run(["--data", str(data), "--concurrency", "3"], seen))
    assert model == "fake"
    assert [outcome.question for outcome in outcomes] == [f"What is {n}?" for n in range(10)]
    assert [n for n, outcome in enumerate(outcomes) if not outcome.right] == [3, 7]
    assert outcomes[7].error == "HTTP 503: busy"
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in seen} == {("fake", 0, 256)}


def _stub(monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    async def evaluate(_: Any, items: list[Any]) -> tuple[str, list[Any]]:
        return "stub", [
            script.Outcome(item.question, str(item.gold), str(item.gold) if n < right else "99", "text", None)
            for n, item in enumerate(items)
        ]

    monkeypatch.setattr(script, "evaluate", evaluate)


@pytest.mark.parametrize(("right", "code"), [(10, 0), (9, 0), (8, 1)])
def test_main_exit_code_and_report(
    right: int, code: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _stub(monkeypatch, right)
    report = tmp_path / "report.json"
    arguments = ["--data", str(data), "--json", str(report), "--min-accuracy", "0.9", "--show-wrong"]
    assert script.main(arguments) == code
    written = json.loads(report.read_text(encoding="utf-8"))
    assert (written["right"], written["wrong"], written["accuracy"]) == (right, 10 - right, right / 10)
    assert len(written["outcomes"]) == 10
    printed = capsys.readouterr().out
    assert f"{right} of 10 right" in printed
    assert printed.count("Q: ") == 10 - right


def test_answers_are_compared_with_an_earlier_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stub(monkeypatch, 10)
    earlier = tmp_path / "earlier.json"
    assert script.main(["--data", str(data), "--json", str(earlier)]) == 0
    report = json.loads(earlier.read_text())
    report["outcomes"][0]["text"] = "another text"
    report["outcomes"][1] |= {"text": "", "error": "HTTP 503"}
    earlier.write_text(json.dumps(report))
    assert script.main(["--data", str(data), "--against", str(earlier)]) == 0
    assert "8 of 9 answers (88.89%) are the same text" in capsys.readouterr().out
    earlier.write_text(json.dumps({"outcomes": []}))
    assert script.main(["--data", str(data), "--against", str(earlier)]) == 2
    assert "no answer to any of these questions" in capsys.readouterr().err


def test_main_without_minimum_accepts_any_accuracy(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(monkeypatch, 0)
    assert script.main(["--data", str(data)]) == 0


def test_main_reports_what_stops_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", str(tmp_path / "absent.jsonl")]) == 2
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert script.main(["--data", str(empty)]) == 2
    assert "holds no problems" in capsys.readouterr().err
