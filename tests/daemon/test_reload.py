"""The parts of a reload: who is told what, the life of a log level, and what is written back."""

from __future__ import annotations

import errno
import json
import logging
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from daemon.config import load_config
from daemon.dynamic_level import EXPIRED, DynamicLevel
from daemon.log_writeback import with_log_settings, write_log_settings
from daemon.reload import HOT_KEYS, ConfigWatcher
from engine.settings import LogSettings
from engine.wire.codec import decode, encode
from engine.wire.messages import Reconfigure
from tests.daemon.config_home import Home

NOW = datetime(2026, 1, 31, 12, 0, 0)


class Watched:
    """A home with a watcher of its configuration, and what the watcher asked for."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.server["httpsEnabled"] = False
        self.levels: list[str] = []
        self.home.load()
        self._loaded = 0

        def load(last_log: LogSettings = EXPIRED) -> object:
            return load_config(None, self.home.environ, root / "bin" / "mindieservice_daemon", last_log)

        self.watcher = ConfigWatcher(load(), load, self.levels.append)  # type: ignore[arg-type]
        assert self.watcher.poll() is None

    def save(self, text: str | None = None) -> None:
        """Write the document, or `text`, with a time of change of its own."""
        self._loaded += 1
        file = self.home.put("conf/config.json", text or json.dumps(self.home.document), 0o640)
        os.utime(file, (self._loaded, self._loaded))

    def poll(self) -> Reconfigure | None:
        """As the supervisor does when five seconds have passed."""
        self.watcher._next = 0.0
        return self.watcher.poll()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


# --- keys ---


def test_every_hot_key_exists(watched: Watched) -> None:
    assert set(watched.watcher._values.by_path()) >= HOT_KEYS


def test_F25_api_keys_are_replaced_and_never_shown(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    key = {"name": "team-a", "sha256": "ab" * 32, "maxRunning": 2}
    watched.home.backend["runtimeConfig"] = {"apiKeys": [key]}
    watched.save()
    with caplog.at_level(logging.INFO):
        message = watched.poll()
    assert message is not None and message.api_keys == (("team-a", b"\xab" * 32, 2, 0, 0),)
    assert "applied: BackendConfig.runtimeConfig.apiKeys" in caplog.text and "abab" not in caplog.text
    watched.home.backend["runtimeConfig"] = {"apiKeys": [{**key, "sha256": "secret-in-the-wrong-place"}]}
    watched.save()
    assert watched.poll() is None
    assert "apiKeys[0].sha256" in caplog.text and "secret-in-the-wrong-place" not in caplog.text


def test_F25_hot_keys_are_applied_and_the_others_named(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.home.server.update(maxLinkNum=7, openAiSupport="openai", tokenTimeout=5, port=2025)
    watched.save()
    with caplog.at_level(logging.INFO):
        message = watched.poll()
    assert message is not None
    assert (message.max_link_num, message.openai_flavour, message.token_timeout_s) == (7, "openai", 600)
    assert "applied: ServerConfig.maxLinkNum, ServerConfig.openAiSupport;" in caplog.text
    assert "needs a restart: ServerConfig.port=2025, ServerConfig.tokenTimeout=5" in caplog.text
    assert watched.watcher.in_force == message
    assert watched.poll() is None, "once is enough"
    assert decode(encode(message)) == message


def test_F25_raised_timeouts_go_back_to_the_configured_ones(watched: Watched) -> None:
    watched.home.document["EnableDynamicAdjustTimeoutConfig"] = True
    watched.save()
    raised = watched.poll()
    assert raised is not None and (raised.token_timeout_s, raised.e2e_timeout_s) == (3600, 65535)
    watched.home.document["EnableDynamicAdjustTimeoutConfig"] = False
    watched.save()
    restored = watched.poll()
    assert restored is not None and (restored.token_timeout_s, restored.e2e_timeout_s) == (600, 600)


@pytest.mark.parametrize(
    ("text", "part"), [("{", "not valid JSON"), ('{"ServerConfig": 5}', "must be an object")]
)
def test_F25_a_bad_file_changes_nothing_and_is_told_once(
    watched: Watched, caplog: pytest.LogCaptureFixture, text: str, part: str
) -> None:
    watched.save(text)
    assert watched.poll() is None and watched.poll() is None
    (record,) = [record for record in caplog.records if record.name == "server.reload"]
    assert record.levelname in ("WARN", "WARNING") and part in record.getMessage()
    watched.home.server["maxLinkNum"] = 9
    watched.save()
    message = watched.poll()
    assert message is not None and message.max_link_num == 9


def test_F25_a_request_reads_an_unchanged_file(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.watcher.request()
    assert watched.watcher.due() == 0.0
    with caplog.at_level(logging.INFO):
        assert watched.watcher.poll() is None
    assert "applied: nothing; needs a restart: nothing" in caplog.text


def test_F25_a_file_that_is_gone_for_a_moment_changes_nothing(watched: Watched) -> None:
    watched.home.file.unlink()
    assert watched.poll() is None
    watched.home.server["maxLinkNum"] = 9
    watched.save()
    message = watched.poll()
    assert message is not None and message.max_link_num == 9


def test_F25_a_failure_of_the_reading_itself_ends_nothing(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_disk(last_log: LogSettings) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(watched.watcher, "_load", lose_the_disk)
    watched.save()
    assert watched.poll() is None
    assert "nothing is changed" in caplog.text and "Input/output error" in caplog.text


# --- the log level ---


def test_a_level_is_set_dated_and_taken_back(watched: Watched) -> None:
    watched.home.document["LogConfig"]["dynamicLogLevel"] = "debug"
    watched.save()
    watched.poll()
    assert watched.levels == ["debug"]
    section = json.loads(watched.home.file.read_text())["LogConfig"]
    since = datetime.strptime(section["dynamicLogLevelValidTime"], "%Y-%m-%d %H:%M:%S")
    assert abs(datetime.now() - since) < timedelta(minutes=5)
    assert watched.poll() is None and watched.levels == ["debug"], "what we wrote is no change"
    section["dynamicLogLevelValidTime"] = (datetime.now() - timedelta(hours=3)).strftime("%Y-%m-%d %H:%M:%S")
    watched.home.document["LogConfig"] = section
    watched.save()
    watched.poll()
    assert watched.levels == ["debug", ""]
    assert json.loads(watched.home.file.read_text())["LogConfig"] == {
        "dynamicLogLevel": "",
        "dynamicLogLevelValidHours": 2,
        "dynamicLogLevelValidTime": "",
    }


def test_a_read_only_file_keeps_the_level_in_memory(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.home.document["LogConfig"]["dynamicLogLevel"] = "llm:debug;server:warn"
    watched.save()
    watched.home.file.chmod(0o440)
    before = watched.home.file.read_bytes()
    watched.poll()
    watched.poll()
    assert watched.levels == ["llm:debug;server:warn"]
    assert watched.home.file.read_bytes() == before
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


def test_a_wrong_level_keeps_the_last_one(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.home.document["LogConfig"]["dynamicLogLevel"] = "debug"
    watched.save()
    watched.poll()
    watched.home.document["LogConfig"]["dynamicLogLevel"] = "loud"
    watched.save()
    watched.poll()
    assert watched.levels == ["debug"]
    assert 'LogConfig.dynamicLogLevel="loud": "debug" is used instead' in caplog.text


def test_a_level_begins_now_when_it_has_no_time_or_one_to_come() -> None:
    for valid_time in ("", "2026-01-31 13:00:00"):
        level, write_back = DynamicLevel().judge(LogSettings("debug", 1, valid_time), NOW)
        assert level == "debug"
        assert write_back == LogSettings("debug", 1, "2026-01-31 12:00:00")


def test_a_level_survives_a_restart_within_its_time_only() -> None:
    wanted = LogSettings("debug", 1, "2026-01-31 11:30:00")
    assert DynamicLevel().judge(wanted, NOW) == ("debug", None)
    assert DynamicLevel().judge(wanted, NOW + timedelta(minutes=30)) == ("", EXPIRED)


def test_another_level_starts_the_time_anew() -> None:
    level = DynamicLevel()
    level.judge(LogSettings("debug", 1, "2026-01-31 11:30:00"), NOW)
    assert level.judge(LogSettings("warn", 1, "2026-01-31 11:30:00"), NOW) == (
        "warn",
        LogSettings("warn", 1, "2026-01-31 12:00:00"),
    )


def test_time_goes_on_where_nothing_can_be_written() -> None:
    level, wanted = DynamicLevel(), LogSettings("debug", 1, "")
    assert level.judge(wanted, NOW).level == "debug"
    assert level.judge(wanted, NOW + timedelta(minutes=59)).level == "debug"
    assert level.judge(wanted, NOW + timedelta(hours=1)).level == ""


# --- writing back ---


def test_only_the_three_values_change() -> None:
    text = (
        '\ufeff{ "A": "LogConfig",\n\t"B": {"LogConfig": {"dynamicLogLevel": "x"}, "n": [1, {}]},\r\n'
        '  "LogConfig" : { "dynamicLogLevel" : "debug" , "dynamicLogLevelValidHours":1 }, "C": "\\"}" }'
    )
    changed = with_log_settings(text, EXPIRED)
    assert changed == (
        '\ufeff{ "A": "LogConfig",\n\t"B": {"LogConfig": {"dynamicLogLevel": "x"}, "n": [1, {}]},\r\n'
        '  "LogConfig" : { "dynamicLogLevel" : "" , "dynamicLogLevelValidHours":2, '
        '"dynamicLogLevelValidTime": "" }, "C": "\\"}" }'
    )


@pytest.mark.parametrize("text", ["{}", '{"LogConfig": []}', '{"LogConfig": {}}'])
def test_nothing_is_written_into_a_file_without_the_section(text: str) -> None:
    with pytest.raises(ValueError, match="LogConfig"):
        with_log_settings(text, EXPIRED)


def test_mode_and_links_stay_and_nothing_is_left_lying(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text('{"LogConfig": {"dynamicLogLevel": "debug"}}')
    file.chmod(0o640)
    link = tmp_path / "config.json"
    link.symlink_to(file)
    write_log_settings(link, EXPIRED)
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    assert json.loads(file.read_text())["LogConfig"]["dynamicLogLevel"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "real.json"]
