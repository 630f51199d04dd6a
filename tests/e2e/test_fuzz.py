"""A share of scripts/fuzz_bodies.py: spoilt requests of every dialect against running daemons."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import TINY_MODEL, Daemon, Installation, eventually, merge, model_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
cases = importlib.import_module("fuzz_cases")
fuzz = importlib.import_module("fuzz_bodies")

MOCK_CASES = range(1, 241)
MODEL_CASES = range(10_000, 10_020)  # not among those that the script sends


def running(installation: Installation, instance_type: str) -> Iterator[Daemon]:
    changes = merge(fuzz.LIMITS, {"BackendConfig": {"ModelDeployConfig": {}}})
    stock = model_config(modelName=cases.NAME, modelInstanceType=instance_type)
    model = stock["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    model["modelWeightPath"] = str(TINY_MODEL)
    changes["BackendConfig"]["ModelDeployConfig"]["ModelConfig"] = [model]
    daemon = installation.daemon(changes).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    assert "Traceback" not in daemon.stderr


@pytest.fixture(scope="module")
def mock(installation: Installation) -> Iterator[Daemon]:
    yield from running(installation, "StandardMock")


@pytest.fixture(scope="module")
def model(installation: Installation) -> Iterator[Daemon]:
    yield from running(installation, "Standard")


@pytest.mark.parametrize("dialect", cases.GOOD)
def test_good_bodies_are_good(mock: Daemon, dialect: str) -> None:
    """Else the spoilt ones would all fail at the same place."""
    for path, body in cases.GOOD[dialect]:
        if not path.endswith("/stopInfer"):
            answer = mock.post(path, body)
            assert answer.status == 200, (body, answer.body)


@pytest.mark.parametrize("dialect", cases.GOOD)
def test_P4_spoilt_requests_do_no_harm(mock: Daemon, dialect: str) -> None:
    ledger: Any = fuzz.fuzz(mock.port, dialect, MOCK_CASES)
    assert ledger.findings == []
    assert sum(ledger.statuses.values()) == len(MOCK_CASES)
    assert ledger.good >= len(MOCK_CASES) // fuzz.GOOD_EVERY - fuzz.CLIENTS
    assert ledger.statuses["200"] and ledger.statuses["422"]


@pytest.mark.parametrize("dialect", cases.GOOD)
def test_nor_do_they_with_the_model(model: Daemon, dialect: str) -> None:
    assert fuzz.fuzz(model.port, dialect, MODEL_CASES).findings == []


def test_nothing_is_left_of_them(mock: Daemon) -> None:
    endpoint = mock.child("endpoint")
    before = fuzz.Footprint.of(endpoint)
    fuzz.fuzz(mock.port, "chat", MOCK_CASES)
    # a connection that has ended here has its end there a little later
    eventually(lambda: not before.growth(fuzz.Footprint.of(endpoint)), 10.0, f"it is as it was: {before}")
