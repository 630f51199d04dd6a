"""The check of seeds, against a real daemon: it passes, and it can fail."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import HOST, Daemon

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
verify: Any = importlib.import_module("verify_determinism")


def test_it_counts_equal_texts_of_a_running_server(
    server: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--url", f"http://{HOST}:{server.port}", "--requests", "6", "--streams", "6", "--max-tokens", "8"]
    assert verify.main(argv) == 0
    assert "together: 6 equal, 0 different" in capsys.readouterr().out


def test_it_fails_where_a_text_differs(
    server: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verify.Client.complete
    calls = []

    def unseeded(self: Any, body: dict[str, Any]) -> str:
        calls.append(body)
        own = {key: value for key, value in body.items() if key != "seed"}
        return str(honest(self, own if len(calls) > 4 else body))

    monkeypatch.setattr(verify.Client, "complete", unseeded)
    argv = [
        "--url",
        f"http://{HOST}:{server.port}",
        "--requests",
        "4",
        "--streams",
        "2",
        "--max-tokens",
        "20",
    ]
    assert verify.main(argv) == 1
    assert "different" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--url", "http://127.0.0.1:9", "--requests", "1"]) == 2
    assert "cannot verify" in capsys.readouterr().err
