"""Start-up phases are read off a real daemon's log."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
startup = importlib.import_module("measure_startup")

LOG = """\
[2026-01-31 12:00:01.000] [1] [1] [server] [INFO] [main.py-141] : configuration /x/config.json, 1 worker(s)
[2026-01-31 12:00:01.250] [1] [1] [server] [INFO] [supervisor.py-1] : role=worker instance=0 pid=3 started
[2026-01-31 12:00:03.000] [1] [1] [server] [INFO] [supervisor.py-1] : role=worker instance=0: weights 20 %
[2026-01-31 12:00:03.500] [1] [1] [server] [INFO] [supervisor.py-1] : role=worker instance=0: weights 100 %
[2026-01-31 12:00:06.000] [1] [1] [server] [INFO] [supervisor.py-1] : role=endpoint pid=2 ready: open
"""


def test_phases_follow_each_other_to_the_total() -> None:
    ends = startup.phase_ends(LOG)
    began = ends["endpoint ready"] - 5.5
    taken = startup.durations(began, ends)
    assert taken == pytest.approx(
        {
            "interpreter, configuration": 0.5,
            "forks": 0.25,
            "imports, headers of the weights": 1.75,
            "weights": 0.5,
            "endpoint ready": 2.5,
            "total": 5.5,
        }
    )


def test_a_log_without_its_lines_is_an_error() -> None:
    with pytest.raises(ValueError, match="endpoint was ready"):
        startup.durations(0.0, {})


def test_a_real_start_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINDIE_LOG_LEVEL", "INFO")
    assert startup.main(["--mock", "--times", "1"]) == 0
    out = capsys.readouterr().out
    for row in ("interpreter, configuration", "worker ready", "total", "parent", "endpoint", "worker 0"):
        assert f"| {row} |" in out
