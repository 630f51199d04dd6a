"""runtimeConfig.apiKeys: every mistake is told, and neither a key nor its hash is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from daemon.config_report import ConfigError
from engine.settings import ApiKeySettings
from tests.daemon.config_home import Home

PATH = "BackendConfig.runtimeConfig.apiKeys"
HASH = hashlib.sha256(b"key").hexdigest()
GOOD = {"name": "alice", "sha256": HASH}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.server["httpsEnabled"] = False
    return home


def set_keys(home: Home, keys: Any) -> None:
    home.backend["runtimeConfig"] = {"apiKeys": keys}


def test_no_keys_as_before(home: Home) -> None:
    assert home.load().endpoint.api_keys == ()
    set_keys(home, [])
    assert home.load().endpoint.api_keys == ()
    assert home.load().endpoint.max_waiting_tokens == 0


def test_every_member(home: Home) -> None:
    other = hashlib.sha256(b"other").hexdigest().upper()
    full = {"name": "bob-2", "sha256": other, "maxRunning": 1, "maxQueued": 2, "tokensPerMinute": 3}
    set_keys(home, [GOOD, full])
    assert home.load().endpoint.api_keys == (
        ApiKeySettings("alice", bytes.fromhex(HASH)),
        ApiKeySettings("bob-2", bytes.fromhex(other), 1, 2, 3),
    )


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        (GOOD, "", "must be an array of objects"),
        (HASH, "", "must be an array of objects"),
        ([HASH], "", "must be an array of objects"),
        ([{"sha256": HASH}], "[0].name=<absent>", "required key is missing"),
        ([{"name": "alice"}], "[0].sha256=<absent>", "64 hex digits"),
        ([{**GOOD, "name": f"{HASH}!"}], "[0].name", "malformed"),
        ([{**GOOD, "name": 5}], "[0].name", "must be a string"),
        ([{**GOOD, "sha256": HASH[:-1]}], "[0].sha256", "no SHA-256 in hex digits"),
        ([{**GOOD, "sha256": f"{HASH}\n"}], "[0].sha256", "no SHA-256 in hex digits"),
        ([{**GOOD, "sha256": 5}], "[0].sha256", "no SHA-256 in hex digits"),
        ([{**GOOD, "maxRunning": -1}], "[0].maxRunning=-1", "allowed: [0, 4096]"),
        ([{**GOOD, "maxQueued": 8193}], "[0].maxQueued=8193", "allowed: [0, 8192]"),
        ([{**GOOD, "tokensPerMinute": True}], "[0].tokensPerMinute=true", "not a boolean"),
        ([{**GOOD, "tokensPerMinute": HASH}], "[0].tokensPerMinute", "must be an integer"),
        ([{**GOOD, "key": HASH}], "[0].key", "unknown key"),
        ([GOOD, {**GOOD, "sha256": "0" * 64}], "[1].name", f"is the name of {PATH}[0] already"),
        ([GOOD, {**GOOD, "name": "bob"}], "[1].sha256", f"is the hash of {PATH}[0] already"),
    ],
)
def test_mistakes(home: Home, keys: Any, where: str, what: str) -> None:
    set_keys(home, keys)
    finding = home.only_finding()
    assert finding.startswith(f"[config] {PATH}{where}") and what in finding
    assert HASH[:16] not in finding


def test_a_misspelt_list_is_not_shown_either(home: Home) -> None:
    home.backend["runtimeConfig"] = {"apikeys": [GOOD]}
    finding = home.only_finding()
    assert "did you mean apiKeys?" in finding and HASH[:16] not in finding


def test_a_repeated_member_is_not_shown_either(home: Home) -> None:
    set_keys(home, [GOOD])
    text = json.dumps(home.document).replace(f'"sha256": "{HASH}"', f'"sha256": "{HASH}", "sha256": "{HASH}"')
    with pytest.raises(ConfigError, match="more than once") as caught:
        home.load_text(text)
    assert HASH[:16] not in str(caught.value)
