"""Who has a key, what is counted and logged of those who have none, and the tokens of a minute."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time

import pytest
from multidict import CIMultiDict

from endpoint.api_keys import ApiKey, ApiKeys
from engine.errors import Unauthorized
from engine.settings import ApiKeySettings

SECRET = "mindie-secret-of-alice"


def settings(name: str, secret: str, **limits: int) -> ApiKeySettings:
    return ApiKeySettings(name, hashlib.sha256(secret.encode()).digest(), **limits)


def who(keys: ApiKeys, **headers: str) -> str | None:
    given = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    key = keys.authenticate(given, "10.0.0.1")
    return None if key is None else key.name


def test_without_keys_everybody_may_ask() -> None:
    assert who(ApiKeys(())) is None and who(ApiKeys(()), x_api_key="anything") is None


def test_a_key_is_found_wherever_clients_put_it() -> None:
    keys = ApiKeys([settings("alice", SECRET), settings("bob", "b")])
    assert who(keys, Authorization=f"Bearer {SECRET}") == "alice"
    assert who(keys, authorization=f"bearer  {SECRET} ") == "alice"
    assert who(keys, X_Api_Key=SECRET) == who(keys, api_key=SECRET) == "alice"
    assert who(keys, Authorization="Basic eDp5", x_api_key="b") == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"x_api_key": SECRET + "x"}, {"x_api_key": SECRET[:-1]}, {"x_api_key": ""},
        {"Authorization": SECRET}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {SECRET}"},
        {"x_api_key": hashlib.sha256(SECRET.encode()).hexdigest()}, {"x_api_key": "\udcff\x00"},
    ],
)  # fmt: skip
def test_anything_else_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized, match="Authorization: Bearer"):
        who(ApiKeys([settings("alice", SECRET)]), **headers)


def test_A21_failures_are_counted_by_address_and_told_without_the_key(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ApiKeys([settings("alice", SECRET)])
    with caplog.at_level(logging.DEBUG, "server"):
        for number in range(1200):
            with contextlib.suppress(Unauthorized):
                keys.authenticate({"Authorization": f"Bearer wrong{number}"}, f"peer {number // 2}")
        later = time.monotonic() + 60
        monkeypatch.setattr("time.monotonic", lambda: later)
        with contextlib.suppress(Unauthorized):
            keys.authenticate({}, "peer 7")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2, "one line for a flood"
    assert "1200 since the last such line; peer 7: 3, " in caplog.messages[1]
    assert "wrong" not in caplog.text and SECRET not in caplog.text


def test_keys_are_replaced_while_their_requests_run() -> None:
    keys = ApiKeys([settings("alice", "old", max_running=1), settings("bob", "b")])
    alice = keys.authenticate({"x-api-key": "old"}, "p")
    keys.replace([settings("alice", "new", max_running=7)])
    assert keys.authenticate({"x-api-key": "new"}, "p") is alice
    assert alice is not None and alice.limits.max_running == 7
    for gone in ("old", "b"):
        with pytest.raises(Unauthorized):
            keys.authenticate({"x-api-key": gone}, "p")
    keys.replace(())
    assert keys.authenticate({}, "p") is None


def test_the_settings_do_not_show_the_hash() -> None:
    one = settings("alice", SECRET)
    assert one.sha256.hex() not in repr(one) and str(one.sha256) not in repr(one)


def test_the_tokens_of_a_minute_come_back_evenly() -> None:
    now = 50.0
    key = ApiKey(settings("k", "k", tokens_per_minute=120), lambda: now)
    key.spend(119)
    assert key.wait_s() == 0.0
    key.spend(21)  # what was asked for before may still cost more
    assert key.wait_s() == pytest.approx(10.5)
    now += 10.5
    assert key.wait_s() == pytest.approx(0.0)
    now += 3600
    key.spend(120)
    assert key.wait_s() == pytest.approx(0.5), "no more than a minute's worth is saved up"


def test_a_new_limit_of_tokens_holds_at_once() -> None:
    now = 0.0
    key = ApiKey(settings("k", "k"), lambda: now)
    key.spend(10**9)
    assert key.wait_s() == 0.0
    key.replace_limits(settings("k", "k", tokens_per_minute=60))
    key.spend(60)
    assert key.wait_s() == pytest.approx(1.0)
    key.replace_limits(settings("k", "k", tokens_per_minute=6000))
    assert key.wait_s() == pytest.approx(0.01), "the debt stays, it is paid back faster"
    key.replace_limits(settings("k", "k"))
    assert key.wait_s() == 0.0
