"""What the script prints is taken by the validator, and opens the door."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from endpoint.api_keys import ApiKeys
from tests.daemon.config_home import Home

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
make_api_key: Any = importlib.import_module("make_api_key")


def test_the_entry_is_configuration_and_the_key_is_not_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_api_key.main(["alice", "--max-running", "2", "--tokens-per-minute", "60"]) == 0
    printed = capsys.readouterr()
    key = printed.err.strip().rpartition(" ")[2]
    assert len(key) >= 43 and key not in printed.out
    home = Home(tmp_path)
    home.server["httpsEnabled"] = False
    home.backend["runtimeConfig"] = {"apiKeys": [json.loads(printed.out)]}
    keys = ApiKeys(home.load().endpoint.api_keys)
    found = keys.authenticate({"Authorization": f"Bearer {key}"}, "peer")
    assert found is not None
    limits = found.limits
    assert (limits.name, limits.max_running, limits.max_queued, limits.tokens_per_minute) == (
        "alice",
        2,
        0,
        60,
    )


def test_a_key_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("sk-brought-along-0123\n"))
    assert make_api_key.main(["bob", "--stdin"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out).keys() == {"name", "sha256"} and "brought" not in printed.out + printed.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    assert make_api_key.main(["bob", "--stdin"]) == 2
    with pytest.raises(SystemExit):
        make_api_key.main(["no name"])
