"""Honest health: what the probes of the running daemon say as its state changes (F29, P12)."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import TINY_MODEL, Answer, Daemon, Json, eventually, model_config

MakeDaemon = Callable[..., Daemon]
TOKENS = 900_000  # tens of seconds of an echo
STATUS_PATH = "/v1/engine-server/running-status"
COMMAND_PATH = "/v1/engine-server/fault-handling-command"
NORMAL, ABNORMAL, PAUSE, BUSY = 1, 2, 3, 5


def echoes(**server: object) -> Json:
    """A daemon without a model that takes long requests, with changes to ServerConfig."""
    config = model_config(
        modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL), modelInstanceType="StandardMock"
    )
    config["BackendConfig"]["ScheduleConfig"] = {"maxIterTimes": TOKENS}
    config["BackendConfig"]["ModelDeployConfig"]["maxSeqLen"] = TOKENS + 1000
    return {**config, "ServerConfig": server}


def completion(max_tokens: int = 1) -> Json:
    return {"model": "mindie-tiny", "prompt": "Hi", "max_tokens": max_tokens, "ignore_eos": True}


@contextlib.contextmanager
def asked(daemon: Daemon, count: int) -> Iterator[None]:
    """As many endless requests on their way; their clients hang up at the end."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(contextlib.closing(daemon.connect()))
            connection.request("POST", "/v1/completions", json.dumps(completion(TOKENS)).encode())
        yield


def state(daemon: Daemon) -> int:
    status: int = daemon.manage(STATUS_PATH).json()["status"]
    return status


def probes(daemon: Daemon) -> tuple[int, ...]:
    paths = ("/v2/health/live", "/v2/health/ready", "/health", "/v2/models/mindie-tiny/ready")
    return tuple(daemon.manage(path).status for path in paths)


def command(daemon: Daemon, cmd: object) -> Answer:
    return daemon.request("POST", COMMAND_PATH, json.dumps({"cmd": cmd}).encode(), daemon.management_port)


def counters(daemon: Daemon) -> dict[str, float]:
    text = daemon.request("GET", "/metrics", port=daemon.metrics_port).body.decode()
    families = text_string_to_metric_families(text)
    return {s.name: s.value for f in families for s in f.samples if s.name.endswith("_total")}


@contextlib.contextmanager
def stopped(worker: psutil.Process) -> Iterator[None]:
    """Stopped as by a debugger; it may be dead by the end, as nobody waits for ever for a worker."""
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def held_back(daemon: Daemon) -> Iterator[None]:
    """An instance that has died, and whose successor does not get on with its start."""
    before = {child.pid for child in daemon.children()}
    daemon.child("worker").kill()

    def successors() -> list[psutil.Process]:
        return [child for child in daemon.children() if child.pid not in before]

    eventually(successors, 30.0, "a new worker")
    [successor] = successors()
    with stopped(successor):
        yield


def test_P12_F01_an_instance_that_is_replaced_shows_while_another_serves(make_daemon: MakeDaemon) -> None:
    config = echoes()
    config["BackendConfig"] |= {"modelInstanceNumber": 2, "npuDeviceIds": [[0], [1]]}
    daemon = make_daemon(config).start().wait_ready()
    with held_back(daemon):
        eventually(lambda: daemon.manage("/v2/health/live").body, 10.0, "a death that is told")
        live, ready = daemon.manage("/v2/health/live"), daemon.manage("/v2/health/ready")
        assert live.status == 200 and "is restarting (was killed by SIGKILL" in live.json()["message"]
        assert ready.status == 200 and ready.body == b""
        assert live.headers["degraded"] == ready.headers["degraded"] == "1 of 2 instances"
        assert probes(daemon) == (200, 200, 200, 200) and state(daemon) == NORMAL
        assert daemon.manage("/health/timed-10").status == 200
        assert daemon.post("/v1/completions", completion()).status == 200
    eventually(lambda: not daemon.manage("/v2/health/live").body, 30.0, "both instances")
    assert "degraded" not in daemon.manage("/v2/health/ready").headers


def test_P12_F01_without_an_instance_the_service_lives_but_is_not_ready(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(echoes()).start().wait_ready()
    with held_back(daemon):
        eventually(lambda: daemon.manage("/v2/health/ready").status == 503, 10.0, "a death that is told")
        assert probes(daemon) == (200, 503, 503, 503) and state(daemon) == ABNORMAL
        assert "no instance can serve now; instance 0" in daemon.manage("/v2/health/live").json()["message"]
        answer = daemon.manage("/health/timed-10")
        assert answer.status == 503 and "instance 0 is restarting" in answer.json()["error"]
        scraped = daemon.request("GET", "/metrics", port=daemon.metrics_port)
        assert scraped.status == 200
    eventually(lambda: probes(daemon) == (200, 200, 200, 200), 30.0, "it serves again")
    assert state(daemon) == NORMAL


def test_F29_P12_a_full_queue_is_busy_and_the_deep_probe_does_not_stand_in_it(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon(echoes(maxLinkNum=1)).start().wait_ready()
    assert probes(daemon) == (200, 200, 200, 200) and state(daemon) == NORMAL
    with asked(daemon, 3):
        eventually(lambda: daemon.manage("/v2/health/ready").status == 503, 10.0, "a full server")
        assert probes(daemon) == (200, 503, 200, 200) and state(daemon) == BUSY
        assert "alive but busy" in daemon.manage("/v2/health/live").json()["message"]
        before = counters(daemon)
        for _ in range(5):
            assert daemon.manage("/health/timed-10").json() == {"status": "healthy"}
        after = counters(daemon)
        for name in ("request_received_total", "request_success_total", "prompt_tokens_total"):
            assert after[name] == before[name], "a probe is no request"
        assert daemon.post("/v1/completions", completion()).status == 503
    eventually(lambda: probes(daemon) == (200, 200, 200, 200), 10.0, "room again")
    assert state(daemon) == NORMAL


def test_F29_a_probe_of_a_stopped_worker_ends_with_its_time(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(echoes()).start().wait_ready()
    with stopped(daemon.child("worker")):
        answer = daemon.manage("/health/timed-1")
        assert answer.status == 500 and "no token within 1 s" in answer.json()["error"]
        assert daemon.manage("/v2/health/live").status == 200  # nobody has asked for checks
    eventually(lambda: daemon.manage("/health/timed-1").status == 200, 30.0, "tokens again")


@pytest.mark.slow
def test_F29_P12_the_checker_sees_a_worker_that_makes_no_tokens(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(echoes(HealthCheckConfig={"npuUsageThreshold": 50})).start().wait_ready()
    with stopped(daemon.child("worker")):
        eventually(lambda: state(daemon) == ABNORMAL, 40.0, "two rounds without a token, or a dead worker")
        live = daemon.manage("/v2/health/live")
        assert live.status == 500 or "restarting" in live.json()["message"]
        assert daemon.manage("/v2/health/ready").status in (500, 503)
    eventually(lambda: state(daemon) == NORMAL, 40.0, "tokens again")
    assert probes(daemon) == (200, 200, 200, 200)
    assert counters(daemon)["request_received_total"] == 0


def test_P12_a_pause_refuses_requests_until_the_start(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(echoes()).start().wait_ready()
    for wrong in (-1, 4, True, "0", 1.5, None):
        assert command(daemon, wrong).status == 422
    assert command(daemon, 2).status == 400  # nothing is paused
    with asked(daemon, 1):
        eventually(
            lambda: daemon.manage("/v1/status").json()["resource"]["runningRequestNum"], 10.0, "it runs"
        )
        answer = command(daemon, 0)
        assert answer.status == 200 and answer.json()["status"] is True
        assert answer.json()["reason"] == [{"device_id": 0, "result": "success", "message": "serving"}]
        assert state(daemon) == PAUSE and probes(daemon) == (200, 503, 503, 503)
        refused = daemon.post("/v1/completions", completion())
        assert refused.status == 503 and "paused" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) >= 1
        assert counters(daemon)["request_failed_total"] == 1  # what was running runs on
    assert command(daemon, 0).status == 400
    assert command(daemon, 1).status == 200 and state(daemon) == 0
    assert command(daemon, 2).status == 200 and state(daemon) == NORMAL
    assert daemon.post("/v1/completions", completion()).status == 200


def test_P12_F24_a_stop_is_told_at_once(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(echoes()).start().wait_ready()
    with asked(daemon, 1):
        eventually(
            lambda: daemon.manage("/v1/status").json()["resource"]["runningRequestNum"], 10.0, "it runs"
        )
        daemon.popen.send_signal(signal.SIGTERM)
        eventually(lambda: probes(daemon) == (503, 503, 503, 503), 10.0, "a stopping server")
        assert "stopping" in daemon.manage("/v2/health/live").json()["message"]
        assert daemon.manage("/health/timed-10").status == 200  # it tells of the engine
        assert command(daemon, 0).status == 400
        daemon.popen.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.stderr
