"""Configuration under the real daemon: findings before anything starts, and reloads while it serves."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
from collections.abc import Callable

import pytest

from tests.daemon.test_config_corpus import CORPUS
from tests.harness import HOST, TINY_MODEL, Daemon, Json, eventually, merge, model_config

MakeDaemon = Callable[..., Daemon]

_MOCK = model_config(modelInstanceType="StandardMock", modelWeightPath=str(TINY_MODEL))


def change(daemon: Daemon, changes: Json) -> None:
    """Change conf/config.json as an editor does: a new file in the place of the old one."""
    path = daemon.root / "conf" / "config.json"
    text = json.dumps(merge(json.loads(path.read_text()), changes))
    fresh = path.with_name("config.json.new")
    fresh.write_text(text)
    fresh.chmod(0o640)
    os.replace(fresh, path)


def hang_up(daemon: Daemon) -> None:
    daemon.popen.send_signal(signal.SIGHUP)


def logged(daemon: Daemon, *parts: str) -> None:
    """Wait until one line of the log holds all `parts`."""
    try:
        eventually(
            lambda: any(all(part in line for part in parts) for line in daemon.stderr.splitlines()),
            30.0,
            f"{parts} in the log",
        )
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{daemon.stderr[-3000:]}") from None


def concurrent_requests(daemon: Daemon) -> int:
    limit: int = daemon.manage("/info").json()["max_concurrent_requests"]
    return limit


def test_F25_sighup_applies_hot_keys_and_names_the_rest(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(_MOCK).start().wait_ready()
    before = {child.pid for child in daemon.children()}
    assert concurrent_requests(daemon) == 1000
    change(daemon, {"ServerConfig": {"maxLinkNum": 7, "tokenTimeout": 30}})
    hang_up(daemon)
    logged(daemon, "applied: ServerConfig.maxLinkNum;", "needs a restart: ServerConfig.tokenTimeout=30")
    eventually(lambda: concurrent_requests(daemon) == 7, 10.0, "the limit in force")
    assert {child.pid for child in daemon.children()} == before

    change(daemon, {"ServerConfig": {"maxLinkNum": 0}})
    hang_up(daemon)
    logged(daemon, "nothing is changed", "ServerConfig.maxLinkNum=0: out of range; allowed: [1, 4096]")
    assert concurrent_requests(daemon) == 7
    answer = daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "a", "max_tokens": 1})
    assert answer.status == 200

    change(daemon, {"ServerConfig": {"maxLinkNum": 9}, "LogConfig": {"dynamicLogLevel": "debug"}})
    hang_up(daemon)
    logged(daemon, "log level: debug")
    eventually(lambda: concurrent_requests(daemon) == 9, 10.0, "the limit after a bad file")
    section = json.loads((daemon.root / "conf" / "config.json").read_text())["LogConfig"]
    assert section["dynamicLogLevelValidTime"], "since when is written down"
    assert daemon.stop() == 0, daemon.stderr


@pytest.mark.slow  # the file is looked at every five seconds
def test_F25_under_nohup_the_file_alone_is_enough(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(_MOCK)
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as nohup does it
    try:
        daemon.start()
    finally:
        signal.signal(signal.SIGHUP, previous)
    daemon.wait_ready()
    hang_up(daemon)
    change(daemon, {"ServerConfig": {"maxLinkNum": 7}})
    eventually(lambda: concurrent_requests(daemon) == 7, 30.0, "the limit in force")
    assert "SIGHUP received" not in daemon.stderr
    assert daemon.stop() == 0, daemon.stderr


def test_F25_a_sighup_while_starting_is_kept(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(_MOCK).start()
    logged(daemon, "role=endpoint", "started")
    change(daemon, {"ServerConfig": {"maxLinkNum": 7}})
    hang_up(daemon)
    daemon.wait_ready()
    eventually(lambda: concurrent_requests(daemon) == 7, 30.0, "the limit in force")
    assert daemon.stop() == 0, daemon.stderr


def test_F25_certificates_are_read_again(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(_MOCK, https=True).start().wait_ready()
    hang_up(daemon)
    logged(daemon, "applied: the certificates")
    logged(daemon, "server.pem", "read again")
    key = daemon.root / "security" / "keys" / "server.key.pem"
    good = key.read_bytes()
    key.chmod(0o600)
    key.write_bytes((daemon.client_dir / "client.key.pem").read_bytes())
    hang_up(daemon)
    logged(daemon, "the certificates stay as they are", "server.key.pem")
    assert daemon.get("/v1/models").status == 200, "what was loaded stays in force"
    key.write_bytes(good)
    assert daemon.stop() == 0, daemon.stderr


def test_F31_findings_of_every_kind_in_one_run_before_anything_starts(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(
        {
            "ServerConfig": {"port": "1025", "maxLinkNum": 5000, "tokenTimeOut": 5},
            "BackendConfig": {
                "ScheduleConfig": {"templateType": "standard", "maxPrefillTokens": 1024},
                "runtimeConfig": {"deviceTyp": "cpu"},
            },
        }
    )
    assert daemon.start().wait() == 1
    for line in (
        '[config] ServerConfig.port="1025": must be an integer, not a string; allowed: [1024, 65535]; '
        "did you mean 1025?",
        "[config] ServerConfig.maxLinkNum=5000: out of range; allowed: [1, 4096]",
        '[config] BackendConfig.ScheduleConfig.templateType="standard": not one of the allowed values; '
        'allowed: "Standard", "Mix"; did you mean "Standard"?',
        "BackendConfig.ScheduleConfig.maxPrefillTokens=1024: smaller than "
        "BackendConfig.ModelDeployConfig.maxInputTokenLen=2048; allowed: [2048, 4194304]",
        'BackendConfig.runtimeConfig.deviceTyp="cpu": unknown key (did you mean deviceType?)',
    ):
        assert line in daemon.stderr, (line, daemon.stderr)
    assert "started" not in daemon.stderr and "5 errors" in daemon.stderr


def test_F16_permissions_name_the_bit_and_the_command(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(_MOCK, https=True)
    key = daemon.root / "security" / "keys" / "server.key.pem"
    key.chmod(0o640)
    config = daemon.root / "conf" / "config.json"
    config.chmod(0o646)
    assert daemon.start("--check-config").wait() == 1
    assert f"mode 0640 is wider than 0600 (group may read); run: chmod 0600 {key}" in daemon.stdout
    command = f"mode 0646 is wider than 0640 (others may read, write); run: chmod 0640 {config}"
    assert f"warning: config.json={config}: {command}" in daemon.stdout
    daemon.environ = {"MINDIE_CHECK_INPUTFILES_PERMISSION": "1"}
    assert daemon.start("--check-config").wait() == 1
    assert f'[config] config.json="{config}": {command}; allowed: mode 0640 or tighter' in daemon.stdout
    daemon.environ = {"MINDIE_CHECK_INPUTFILES_PERMISSION": "0"}
    assert daemon.start("--check-config").wait() == 0, daemon.stdout


def test_F21_addresses_that_cannot_be_had(make_daemon: MakeDaemon) -> None:
    zero = make_daemon(merge(_MOCK, {"ServerConfig": {"ipAddress": "0.0.0.0"}}))
    assert zero.start().wait() == 1
    assert 'ServerConfig.ipAddress="0.0.0.0": listens on every address of this host' in zero.stderr
    assert "see ServerConfig.allowAllZeroIpListening=false" in zero.stderr
    foreign = make_daemon(merge(_MOCK, {"ServerConfig": {"ipAddress": "192.0.2.1"}}))
    assert foreign.start().wait() == 3
    assert "ServerConfig.ipAddress" in foreign.stderr and "192.0.2.1" in foreign.stderr
    busy = make_daemon(_MOCK)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, busy.port))
        taken.listen()
        assert busy.start().wait() == 3
        assert f"{HOST}:{busy.port}" in busy.stderr and f"by pid {os.getpid()}" in busy.stderr
        assert busy.start("--check-config").wait() == 0, "it may be this very service that runs there"
        assert "warning: a start now would end with exit code 3: business plane" in busy.stdout


@pytest.mark.slow  # a model is loaded
def test_P15_an_original_file_starts_where_its_model_is(make_daemon: MakeDaemon) -> None:
    """Unchanged but for the ports, which others may have taken here, and where the model lies."""
    daemon = make_daemon()
    text = (CORPUS / "v1_0_0_http.json").read_text()
    for original, here in (
        ("/home/models/Qwen2.5-0.5B-Instruct", str(TINY_MODEL)),
        ("1025", str(daemon.port)),
        ("1026", str(daemon.management_port)),
        ("1027", str(daemon.metrics_port)),
    ):
        text = text.replace(original, here)
    (daemon.root / "conf" / "config.json").write_text(text)
    daemon.start().wait_ready()
    body: Json = {"model": "qwen2.5-0.5b", "prompt": "Once upon a time", "max_tokens": 4}
    assert daemon.post("/v1/completions", body).status == 200
    assert "keys without effect in this server, ignored: ServerConfig.{kmcKsfMaster" in daemon.stderr
    assert daemon.stop() == 0, daemon.stderr


def test_F25_an_endpoint_that_replaces_a_dead_one_has_the_values_in_force(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(_MOCK).start().wait_ready()
    change(daemon, {"ServerConfig": {"maxLinkNum": 7}})
    hang_up(daemon)
    eventually(lambda: concurrent_requests(daemon) == 7, 10.0, "the limit in force")
    daemon.child("endpoint").send_signal(signal.SIGKILL)
    logged(daemon, "role=endpoint serves again")

    def in_force() -> bool:
        with contextlib.suppress(OSError, KeyError, ValueError, http.client.HTTPException):
            return concurrent_requests(daemon) == 7
        return False

    eventually(in_force, 30.0, "the limit in force in the new endpoint")
    assert daemon.stop() == 0, daemon.stderr


def test_F25_api_keys_are_replaced_while_serving(make_daemon: MakeDaemon) -> None:
    def keys(*texts: str) -> Json:
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        listed = [{"name": f"key{index}", "sha256": one} for index, one in enumerate(hashes)]
        return {"BackendConfig": {"runtimeConfig": {"apiKeys": listed}}}

    def status(key: str) -> int:
        connection = daemon.connect()
        try:
            body = json.dumps({"model": "mindie-tiny", "prompt": "a", "max_tokens": 1})
            connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {key}"})
            return connection.getresponse().status
        finally:
            connection.close()

    daemon = make_daemon(merge(_MOCK, keys("first"))).start().wait_ready()
    assert (status("first"), status("second")) == (200, 401)
    change(daemon, keys("second"))
    hang_up(daemon)
    logged(daemon, "applied: BackendConfig.runtimeConfig.apiKeys;")
    eventually(lambda: status("second") == 200, 10.0, "the new key")
    assert status("first") == 401
    assert daemon.stop() == 0, daemon.stderr
