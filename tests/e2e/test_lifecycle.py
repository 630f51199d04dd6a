"""Start, names, stop: every way the manual and operations.md know, with real processes and signals."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.harness import HOST, SUCCESS, Answer, Daemon, Json, eventually, merge, sse_payloads
from tests.streams import LONG, LONG_CONFIG, Stream

MakeDaemon = Callable[..., Daemon]


def with_graceful_stop(seconds: int) -> Json:
    return merge(LONG_CONFIG, {"BackendConfig": {"runtimeConfig": {"gracefulStopTimeoutSec": seconds}}})


def ports_free(daemon: Daemon) -> bool:
    for port in (daemon.port, daemon.management_port, daemon.metrics_port):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return False
    return True


def test_the_success_line_comes_once_on_stdout_when_requests_are_served(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    with pytest.raises(ConnectionRefusedError):
        daemon.get("/v1/models")  # refused: nobody listens for inference before the model is there
    daemon.wait_ready()
    assert daemon.manage("/v2/health/ready").status == 200
    assert (
        daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "Hi", "max_tokens": 1}).status
        == 200
    )
    assert daemon.stdout == SUCCESS + "\n"
    assert daemon.stop() == 0


def test_health_tells_how_loading_goes(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    eventually(lambda: "role=worker" in daemon.stderr, 30.0, "forked worker")
    worker = daemon.child("worker")
    worker.send_signal(signal.SIGSTOP)  # it stays loading for as long as we look
    answers: list[Answer] = []

    def answered() -> bool:
        with contextlib.suppress(OSError):
            answers[:] = [daemon.manage("/v2/health/live"), daemon.manage("/v2/health/ready")]
        return len(answers) == 2

    eventually(answered, 30.0, "an answer from the management plane")
    live, ready = answers
    assert (live.status, ready.status) == (200, 503)
    assert "loading" in live.json()["message"] and "loading" in ready.json()["message"]
    worker.send_signal(signal.SIGCONT)
    daemon.wait_ready()
    assert daemon.manage("/v2/health/live").body == b"" and daemon.manage("/v2/health/ready").body == b""


def test_ps_shows_one_parent_and_every_process_has_the_name(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start().wait_ready()
    rows = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout.splitlines()
    mine = [row.split() for row in rows if "mindieservice_daemon" in row]
    children = [row for row in mine if int(row[2]) == daemon.pid]
    assert len(children) == 2  # the endpoint and one worker
    assert [row for row in mine if int(row[1]) == daemon.pid]
    named = subprocess.run(["pgrep", "mindie"], capture_output=True, text=True, check=True).stdout.split()
    family = {daemon.pid, *(child.pid for child in psutil.Process(daemon.pid).children(recursive=True))}
    assert family == {int(row[1]) for row in children} | {daemon.pid}
    assert family <= {int(pid) for pid in named}
    assert all(process.name().startswith("mindieservice_d") for process in map(psutil.Process, family))


def test_kill_of_the_idle_parent_ends_everything_with_exit_code_0(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start().wait_ready()
    start = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - start < 3.0  # the contract's bound for an idle service
    assert ports_free(daemon) and "Traceback" not in daemon.stderr


def test_ctrl_c_reaches_the_whole_group_and_is_clean(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start(new_group=True).wait_ready()
    os.killpg(daemon.pid, signal.SIGINT)
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.stderr and "KeyboardInterrupt" not in daemon.stderr


def test_term_while_starting_stops_with_exit_code_0(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    eventually(lambda: "role=worker" in daemon.stderr, 30.0, "forked worker")
    start = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - start < 5.0  # the contract's bound while starting
    assert SUCCESS not in daemon.stdout


def test_a_signal_in_the_first_moments_is_no_traceback(make_daemon: MakeDaemon) -> None:
    def holds_signals(pid: int) -> bool:
        """Our first line has run: SIGTERM is blocked or has a handler (SIGINT always has Python's own)."""
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigBlk", "SigCgt"))]
        return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)

    for delay in (0.0, 0.05, 0.1, 0.2):
        daemon = make_daemon().start()
        eventually(lambda pid=daemon.pid: holds_signals(pid), 10.0, "the first line")  # type: ignore[misc]
        time.sleep(delay)
        daemon.popen.send_signal(signal.SIGINT)
        code = daemon.wait()
        assert code == 0 and "Traceback" not in daemon.stderr


def test_F24_P5_running_requests_finish_and_new_ones_are_refused(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon(with_graceful_stop(100)).start().wait_ready()
    stream = Stream(daemon)
    assert stream.started.wait(30)
    daemon.popen.send_signal(signal.SIGTERM)
    eventually(lambda: daemon.manage("/v2/health/ready").status == 503, 5.0, "ready 503")
    refused = daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "Hi"})
    assert refused.status == 503 and "retry-after" in refused.headers
    assert daemon.wait(110) == 0
    stream.join(10)
    payloads = sse_payloads(stream.received)
    assert payloads[-1] == "[DONE]" and '"completion_tokens":2000' in payloads[-2]


def test_stop_service_waits_for_running_requests_and_ends_everything(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    stream = Stream(daemon)
    assert stream.started.wait(30)
    assert daemon.manage("/stopService?mode=maybe").status == 422
    answers: list[int] = []
    stopping = threading.Thread(
        target=lambda: answers.append(
            daemon.request("GET", "/stopService", port=daemon.management_port).status
        )
    )
    stopping.start()
    eventually(lambda: daemon.manage("/v2/health/ready").status == 503, 5.0, "ready 503")
    assert daemon.manage("/stopService").status == 500
    assert daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "Hi"}).status == 503
    assert daemon.wait(100) == 0
    stopping.join(5)
    stream.join(5)
    assert answers == [200]
    assert '"completion_tokens":2000' in sse_payloads(stream.received)[-2]


@pytest.mark.slow
def test_stop_service_goes_on_when_whoever_asked_hangs_up(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    stream = Stream(daemon, {**LONG, "max_tokens": 300})
    assert stream.started.wait(30)
    with contextlib.closing(daemon.connect(daemon.management_port)) as asking:
        asking.request("GET", "/stopService")
        eventually(lambda: daemon.manage("/v2/health/ready").status == 503, 5.0, "ready 503")
    assert daemon.wait(100) == 0
    stream.join(5)
    assert '"completion_tokens":300' in sse_payloads(stream.received)[-2]


def test_stop_service_by_force_ends_requests_with_an_error_event(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    streams = [Stream(daemon, {**LONG, "max_tokens": 4000}) for _ in range(20)]
    assert all(stream.started.wait(30) for stream in streams)
    assert daemon.manage("/stopService?mode=Force").status == 200
    assert daemon.wait(20) == 0
    for stream in streams:
        stream.join(5)
        payloads = sse_payloads(stream.received)
        assert payloads[-1] == "[DONE]" and ('"error"' in payloads[-2] or '"usage"' in payloads[-2])


def test_F24_requests_still_running_at_the_deadline_get_an_error_event(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(with_graceful_stop(0)).start().wait_ready()
    stream = Stream(daemon)
    assert stream.started.wait(30)
    assert daemon.stop() == 0
    stream.join(10)
    payloads = sse_payloads(stream.received)
    assert '"error"' in payloads[-2] and "stopped" in payloads[-2] and payloads[-1] == "[DONE]"


def test_F24_a_second_signal_stops_at_once(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    stream = Stream(daemon)
    assert stream.started.wait(30)
    daemon.popen.send_signal(signal.SIGTERM)
    eventually(lambda: "SIGTERM" in daemon.stderr, 5.0, "the first signal's log line")
    daemon.popen.send_signal(signal.SIGINT)
    assert daemon.wait(5) == 0
    assert "died" not in daemon.stderr


@pytest.mark.parametrize("redirection", [">&-", "| true"])
def test_a_standard_output_that_cannot_be_written_is_no_reason_to_die(
    make_daemon: MakeDaemon, redirection: str
) -> None:
    daemon = make_daemon().start(shell=redirection)
    eventually(lambda: SUCCESS in daemon.log("mindie-server"), 60.0, "the success line in the log")
    assert daemon.get("/v1/models").status == 200
    parent = daemon.child("endpoint").ppid()
    os.kill(parent, signal.SIGTERM)
    eventually(lambda: not daemon.leftovers(), 10.0, "an orderly stop")


def test_F07_P7_kill_9_of_the_parent_takes_the_children_along(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start().wait_ready()
    children = daemon.children()
    os.kill(daemon.pid, signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    gone, alive = psutil.wait_procs(children, timeout=3)
    assert not alive and len(gone) == 2
    eventually(lambda: ports_free(daemon), 3.0, "ports free")
    daemon.start().wait_ready()  # at once, on the same ports
    assert daemon.stop() == 0


def test_F11_pkill_9_mindie_leaves_nothing_and_a_restart_works(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start(new_session=True).wait_ready()
    # within the session only: whoever else runs a daemon here keeps it
    subprocess.run(["pkill", "-9", "-s", str(daemon.pid), "mindie"], check=True)
    daemon.wait()
    eventually(lambda: not daemon.leftovers(), 3.0, "no process, socket or shared memory left")
    # a dead process may show as gone while its last thread still holds the sockets
    eventually(lambda: ports_free(daemon), 3.0, "ports free")
    daemon.start().wait_ready()
    assert daemon.stop() == 0


def test_F08_a_second_daemon_is_refused_before_it_loads_anything(make_daemon: MakeDaemon) -> None:
    first = make_daemon().start()
    eventually(lambda: "role=worker" in first.stderr, 30.0, "the first daemon has bound its ports")
    for moment in ("while the first is starting", "while the first is serving"):
        second = make_daemon({"ServerConfig": {"port": first.port}}).start()
        assert second.wait() == 3, moment
        assert "business plane" in second.stderr and f"{HOST}:{first.port}" in second.stderr
        assert "role=" not in second.stderr, "nothing was forked"
        first.wait_ready()
    assert f"by pid {first.pid}" in second.stderr
    assert first.get("/v1/models").status == 200


def test_two_daemons_on_different_ports_do_not_meet(make_daemon: MakeDaemon) -> None:
    first, second = make_daemon().start(), make_daemon().start()
    first.wait_ready()
    second.wait_ready()
    assert first.stop() == 0
    assert second.get("/v1/models").status == 200


def test_F09_a_stale_run_directory_is_swept_and_foreign_names_are_left(make_daemon: MakeDaemon) -> None:
    temporary = Path(tempfile.gettempdir())
    stale, foreign = temporary / f"mindie_{os.getuid()}_999999_1", temporary / "mindie_notes_of_somebody"
    stale.mkdir(exist_ok=True)
    foreign.mkdir(exist_ok=True)
    try:
        daemon = make_daemon().start().wait_ready()
        assert not stale.exists() and foreign.exists() and str(stale) in daemon.stderr
    finally:
        foreign.rmdir()


def test_local_channels_are_private_and_vanish_once_everybody_is_connected(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    found: dict[str, int] = {}

    def seen() -> bool:
        for directory in Path(tempfile.gettempdir()).glob(f"mindie_*_{daemon.pid}_*"):
            with contextlib.suppress(FileNotFoundError):
                found["directory"] = stat.S_IMODE(directory.stat().st_mode)
                for path in directory.iterdir():
                    found[path.name] = stat.S_IMODE(path.stat().st_mode)
        return SUCCESS in daemon.stdout

    eventually(seen, 60.0, "success line")
    assert found.pop("directory") == 0o700
    assert {"ctl.0", "evt.0.0"} <= set(found) and set(found.values()) == {0o600}
    assert not any(name for name in daemon.leftovers() if not name.startswith("process"))
    assert daemon.get("/v1/models").status == 200


def test_two_instances_share_the_load(make_daemon: MakeDaemon) -> None:
    changes = {"BackendConfig": {"modelInstanceNumber": 2, "npuDeviceIds": [[0], [1]]}}
    daemon = make_daemon(merge(LONG_CONFIG, changes)).start().wait_ready()
    assert len(daemon.children()) == 3
    workers = [process for process in daemon.children() if process.pid != daemon.child("endpoint").pid]
    before = [sum(process.cpu_times()[:2]) for process in workers]
    streams = [Stream(daemon, {**LONG, "max_tokens": 300}) for _ in range(6)]
    for stream in streams:
        stream.join(100)
        assert sse_payloads(stream.received)[-1] == "[DONE]"
    used = [sum(process.cpu_times()[:2]) - start for process, start in zip(workers, before, strict=True)]
    assert min(used) > 0.1  # both have computed


def test_an_idle_service_burns_no_processor_time(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start().wait_ready()
    assert daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "Hi"}).status == 200
    family = [psutil.Process(daemon.pid), *daemon.children()]

    def used() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in family)

    before = used()
    time.sleep(2.0)
    assert used() - before < 0.3  # blocked, not spinning (a spinning process would use 2 s)


def test_a_run_writes_nothing_but_logs_into_the_installation(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    before = {p for p in daemon.root.rglob("*") if "__pycache__" not in p.parts}
    daemon.start().wait_ready()
    assert daemon.stop() == 0
    after = {p for p in daemon.root.rglob("*") if "__pycache__" not in p.parts and "log" not in p.parts}
    assert after - before == {daemon.root / "stdout.log", daemon.root / "stderr.log"}
