"""What the running daemon writes down, and that nothing it cannot write disturbs a request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness import SUCCESS, TINY_MODEL, Daemon, Installation, Json, eventually, merge, model_config

MOCK = model_config(
    modelInstanceType="StandardMock", modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL)
)
MARKER = "xylophone-canary-4711"
BODY: Json = {"model": "mindie-tiny", "prompt": f"{MARKER} a b c", "max_tokens": 6, "ignore_eos": True}
MAIN, REQUESTS, AUDIT = "mindie-server", "mindie-llm-request", "security/mindie-server"
PARTS = ("queued_ms", "prepared_ms", "prefill_ms", "decode_ms", "preempted_ms", "written_ms")

MakeDaemon = Callable[..., Daemon]


def ask(
    daemon: Daemon, body: Json = BODY, path: str = "/v1/completions", **headers: str
) -> http.client.HTTPMessage:
    """The head of the answer, with `status` and the whole body beside it."""
    connection = daemon.connect()
    with contextlib.closing(connection):
        connection.request(
            "POST", path, json.dumps(body), {k.replace("_", "-"): v for k, v in headers.items()}
        )
        response = connection.getresponse()
        head = response.headers
        head["x-status"], head["x-body"] = str(response.status), response.read().decode("latin-1")
        head["x-from"] = "{}:{}".format(*connection.sock.getsockname()) if connection.sock else ""
        return head


def fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.rpartition(" : ")[2].split())


def line_of(daemon: Daemon, request_id: str) -> dict[str, str]:
    """The request log's line of one request, once it is there."""
    eventually(lambda: request_id in daemon.log(REQUESTS), 10.0, "the line of the request")
    (line,) = [each for each in daemon.log(REQUESTS).splitlines() if request_id in each]
    return fields(line)


@pytest.fixture(scope="module")
def server(installation: Installation) -> Iterator[Daemon]:
    """An echo, at the level that tells most."""
    daemon = installation.daemon(MOCK)
    daemon.environ["MINDIE_LOG_LEVEL"] = "debug"
    daemon.start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    everything = "".join(path.read_text(encoding="utf-8") for path in daemon.root.rglob("*.log"))
    assert MARKER not in everything, "P10"
    for event in ("start endpoint", "start mindie server", "stop endpoint", "stop mindie server"):
        assert f"[system] [server] [{event}] [success]" in daemon.log(AUDIT)


def test_one_id_in_header_log_audit_and_error(server: Daemon) -> None:
    good = ask(server, req_id="my.name-1")
    bad = ask(server, {**BODY, "max_tokens": -1})
    for head, end in ((good, "length"), (bad, "invalid_request")):
        found = line_of(server, head["RequestUUID"])
        assert found["end"] == end and found["route"] == "/v1/completions"
        assert f"{head['x-status']} {head['RequestUUID']}]" in server.log(AUDIT)
    assert line_of(server, good["RequestUUID"])["req_id"] == "my.name-1"
    assert json.loads(bad["x-body"])["request_id"] == bad["RequestUUID"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_breakdown_adds_up_and_counts_what_the_client_counts(server: Daemon, stream: bool) -> None:
    head = ask(server, {**BODY, "stream": stream}, X_MindIE_Timings="1")
    found = line_of(server, head["RequestUUID"])
    assert abs(sum(float(found[part]) for part in PARTS) - float(found["total_ms"])) < 0.4  # each is rounded
    assert (found["output_tokens"], found["cached_tokens"], found["preemptions"]) == ("6", "0", "0")
    if stream:
        *frames, comment, end = head["x-body"].split("\n\n")
        assert frames[-1] == "data: [DONE]" and end == ""
        told = json.loads(comment.removeprefix(": timings "))
        assert abs(sum(told[part] for part in PARTS) - told["total_ms"]) < 0.4
        assert told["output_tokens"] == 6 and str(told["prompt_tokens"]) == found["prompt_tokens"]
    else:
        usage = json.loads(head["x-body"])["usage"]
        assert str(usage["prompt_tokens"]) == found["prompt_tokens"]
        told = dict(re.findall(r"(\w+);dur=([\d.]+)", head["Server-Timing"]))
        assert abs(sum(float(told[part[:-3]]) for part in PARTS) - float(told["total"])) < 0.4


def test_who_does_not_ask_is_told_nothing(server: Daemon) -> None:
    whole, streamed = ask(server), ask(server, {**BODY, "stream": True})
    assert "Server-Timing" not in whole and "timings" not in streamed["x-body"]


def test_records_that_are_no_events_get_no_comment(server: Daemon) -> None:
    head = ask(server, {**BODY, "stream": True}, "/generate", X_MindIE_Timings="1")
    assert head["x-status"] == "200" and "timings" not in head["x-body"]


def test_a_client_that_leaves_is_told_from_a_failure(server: Daemon) -> None:
    with server.streaming("/v1/completions", {**BODY, "stream": True, "max_tokens": 500}) as response:
        request_id = response.headers["RequestUUID"]
        assert response.read1()
    found = line_of(server, request_id)
    assert found["end"] in ("client_gone", "length"), found  # the echo may have been faster


def test_audit_has_a_line_per_request_and_one_per_answer_without_the_query(server: Daemon) -> None:
    head = ask(server, path=f"/v1/completions?key={MARKER}")
    request_id = head["RequestUUID"]
    eventually(lambda: f"200 {request_id}" in server.log(AUDIT), 10.0, "the answer's line")
    asked, answered = [line for line in server.log(AUDIT).splitlines() if request_id in line]
    form = r"\[[\d: .-]+\] \[\w+\] \[127\.0\.0\.1:\d+\] \[server\] \[POST /v1/completions\] \[{} {}\]"
    assert re.fullmatch(form.format("received", request_id), asked)
    assert re.fullmatch(form.format("200", request_id), answered)
    assert server.get("/no/such/path").status == 404
    assert server.manage("/v2/health/live").status == 200
    eventually(lambda: "[GET /v2/health/live] [200 " in server.log(AUDIT), 10.0, "other planes too")
    assert "[GET /no/such/path] [404 " in server.log(AUDIT)


def test_the_audit_log_has_what_was_tried_short_and_plain(server: Daemon) -> None:
    assert server.get("/" + "a" * 4000 + "/../../etc").status == 404
    with contextlib.closing(server.connect(server.management_port)) as connection:
        connection.request("GET", "/stopService", headers={"Origin": "https://evil.example"})
        assert connection.getresponse().status == 403
    with contextlib.closing(server.connect()) as connection:
        connection.connect()
        connection.sock.sendall(b"GET /x][success HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 404 " in connection.sock.recv(65536).split(b"\r\n")[0]
    eventually(lambda: "[GET /x%5D%5Bsuccess] [404 " in server.log(AUDIT), 10.0, "the last answer's line")
    assert "[GET /stopService] [403 " in server.log(AUDIT)
    assert f"[GET /{'a' * 99}...(4011 characters)] [404 " in server.log(AUDIT)
    assert max(map(len, server.log(AUDIT).splitlines())) < 300


def test_a_malformed_request_is_in_the_audit_log_with_the_id_of_its_answer(server: Daemon) -> None:
    connection = server.connect()
    with contextlib.closing(connection):
        connection.connect()
        connection.sock.sendall(f"GET /{MARKER} HTTP/9.9 {MARKER}\r\n\r\n".encode())
        raw = connection.sock.recv(65536).decode()
    found = re.search(r"RequestUUID: (\w+)", raw)
    assert found, raw
    eventually(lambda: found[1] in server.log(AUDIT), 10.0, "the audit line")
    assert f"[malformed request] [400 {found[1]}]" in server.log(AUDIT)


def test_files_of_every_process_with_modes_for_their_owner(server: Daemon) -> None:
    ask(server)
    eventually(lambda: server.log("mindie-llm-token"), 10.0, "the token log of level debug")
    folder = server.root / "log"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())} == {0o750}
    files = [path for path in folder.rglob("*.log")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    owners = {
        "parent": ("mindie-server", server.pid),
        "endpoint": ("mindie-llm-request", server.child("endpoint").pid),
        "worker": ("mindie-llm", server.child("worker").pid),
        "tokens": ("mindie-llm-token", server.child("worker").pid),
    }
    for stem, pid in owners.values():
        assert [p for p in files if re.fullmatch(rf"{stem}_{pid}_\d{{17}}\.log", p.name)], (stem, pid)
    assert re.search(
        r"\[llm\] \[DEBUG\] .* prefill of \d+ rows: [\d.: ]+$", server.log("mindie-llm-token"), re.M
    )
    for stem in (REQUESTS, "mindie-llm-token"):
        assert not set(server.log(stem).splitlines()) & set(server.stderr.splitlines())


def test_F12_a_standard_error_that_is_full_disturbs_nobody(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    daemon.start(shell="2> /dev/full").wait_ready()
    assert ask(daemon)["x-status"] == "200"
    eventually(
        lambda: "standard error cannot be written: No space left" in daemon.log(MAIN), 10.0, "a warning"
    )
    assert stop_parent(daemon) == 0


@pytest.mark.parametrize("to_stdout", ["0", "1"])
def test_output_log_has_the_success_line_once(make_daemon: MakeDaemon, to_stdout: str) -> None:
    daemon = make_daemon(MOCK)
    daemon.environ["MINDIE_LOG_TO_STDOUT"] = to_stdout
    daemon.start(shell="2>&1").wait_ready()
    assert ask(daemon)["x-status"] == "200"
    assert daemon.stdout.splitlines().count("Daemon start success!") == 1
    assert daemon.stdout.count("Daemon start success!") == 1
    assert daemon.log(MAIN).count("Daemon start success!") == 1
    assert stop_parent(daemon) == 0


def test_F12_started_without_any_standard_stream(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    daemon.start(shell="<&- >&- 2>&-")
    eventually(lambda: "Daemon start success!" in daemon.log(MAIN), 60.0, "the success line in the log")
    assert ask(daemon)["x-status"] == "200"
    assert stop_parent(daemon) == 0


def test_F12_a_disk_that_fills_up_costs_counted_lines_and_no_request(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    daemon.start().wait_ready()
    assert ask(daemon)["x-status"] == "200"
    eventually(lambda: "end=length" in daemon.log(REQUESTS), 10.0, "the request log")
    endpoint = daemon.child("endpoint").pid
    before = resource.prlimit(endpoint, resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    for _ in range(20):
        assert ask(daemon)["x-status"] == "200"
    resource.prlimit(endpoint, resource.RLIMIT_FSIZE, before)
    after = ask(daemon)["RequestUUID"]
    assert line_of(daemon, after)["end"] == "length"
    for name in (REQUESTS, "security/mindie-server"):
        stem = name.rpartition("/")[2]
        told = re.compile(rf"{stem}_{endpoint}_\d+\.log is written again: (\d+) lines were lost")
        eventually(lambda told=told: told.search(daemon.stderr), 10.0, f"{name} tells of its losses")  # type: ignore[misc]
    lost = re.search(r"llm-request_\d+_\d+\.log is written again: (\d+) lines", daemon.stderr)
    assert lost
    assert 1 + 20 + 1 - int(lost[1]) == daemon.log(REQUESTS).count("end=length")
    # what should have warned in time was as full: standard error is a file too
    recovered = re.compile(r"(\S+) is written again")
    eventually(lambda: len(recovered.findall(daemon.stderr)) >= 4, 10.0, "three files and standard error")
    told = recovered.findall(daemon.stderr)
    assert len(told) == len(set(told)) == 4 and "error" in told, told
    assert daemon.stop() == 0


def test_F12_a_folder_that_cannot_be_made_is_warned_of_and_served_without(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    (daemon.root / "file").write_text("in the way")
    daemon.environ["MINDIE_LOG_PATH"] = str(daemon.root / "file")
    daemon.start().wait_ready()
    assert ask(daemon)["x-status"] == "200"
    eventually(lambda: "mindie-llm-request" in daemon.stderr, 10.0, "a warning for that file")
    refused = re.findall(r"(/file/log/\S+) cannot be written: Not a directory", daemon.stderr)
    assert len(refused) == len(set(refused)) >= 4, refused  # one warning for each file
    assert daemon.stop() == 0


def full_pipe() -> tuple[int, int]:
    """Its reading and its writing end."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    return read, write


def test_F32_a_standard_output_that_nobody_reads_does_not_hold_up_the_start(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    read, write = full_pipe()
    with (daemon.root / "stderr.log").open("wb") as err:
        daemon.process = subprocess.Popen(
            ["./bin/mindieservice_daemon"], cwd=daemon.root, stdin=subprocess.DEVNULL, stdout=write,
            stderr=err, env={**os.environ, "MINDIE_LOG_PATH": str(daemon.root)},
        )  # fmt: skip
    os.close(write)
    eventually(lambda: "standard output cannot be written: nobody reads it" in daemon.stderr, 60.0, "a start")
    worker = daemon.child("worker")
    worker.kill()  # the parent goes on as ever
    eventually(lambda: "serves again" in daemon.stderr, 30.0, "a replacement")
    assert ask(daemon)["x-status"] == "200"
    os.close(read)
    assert daemon.stop() == 0


def test_F32_a_reader_of_the_log_that_stops_reading_holds_up_nobody(make_daemon: MakeDaemon) -> None:
    """Standard error leads to a pipe that is full; what goes to standard output is none of its business."""
    daemon = make_daemon(MOCK)
    read, write = full_pipe()
    environ = {**os.environ, "MINDIE_LOG_PATH": str(daemon.root), "MINDIE_LOG_TO_STDOUT": "llm:1"}
    # the success line needs a standard output that is read
    with (daemon.root / "stdout.log").open("wb") as out:
        daemon.process = subprocess.Popen(
            ["./bin/mindieservice_daemon"], cwd=daemon.root, stdin=subprocess.DEVNULL, stdout=out,
            stderr=write, env=environ,
        )  # fmt: skip
    os.close(write)
    eventually(lambda: "Daemon start success!" in daemon.stdout, 60.0, "a start")
    for _ in range(20):
        assert ask(daemon)["x-status"] == "200"
    assert daemon.log(MAIN).count("standard error cannot be written: nobody reads it") >= 1
    while os.read(read, 1 << 20) == b"x" * (1 << 20):
        pass
    assert daemon.stop() == 0
    assert re.search(r"standard error is written again: \d+ lines were lost", daemon.log(MAIN))
    os.close(read)
    assert daemon.stdout.count("end=length") == 20, "the request log on standard output"


def test_files_rotate_and_stay_within_their_number(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    daemon.environ |= {"PYTHON_LOG_MAXSIZE": "2000", "MINDIE_LOG_ROTATE": "-r 3"}
    daemon.start().wait_ready()
    for _ in range(60):
        last = ask(daemon)["RequestUUID"]
    line_of(daemon, last)
    assert daemon.stop() == 0
    for folder, stem in (("debug", REQUESTS), ("security", MAIN)):
        pattern = f"{stem}_{re.search(r'role=endpoint pid=([0-9]+)', daemon.stderr)[1]}_*.log"  # type: ignore[index]
        files = sorted((daemon.root / "log" / folder).glob(pattern))
        assert len(files) == 3, files
        assert [re.sub(r".*_\d{17}", "", path.name) for path in files] == [".01.log", ".02.log", ".log"]
        assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o440, 0o440, 0o640]
        assert all(path.stat().st_size <= 2000 for path in files)
        ages = [first_time(path) for path in (files[1], files[0], files[2])]
        assert ages == sorted(ages)


def first_time(path: Path) -> str:
    return path.read_text(encoding="utf-8")[1:24]


def test_simple_form_standard_output_and_a_path_per_component(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    daemon.environ |= {
        "MINDIE_LOG_VERBOSE": "server:0",
        "MINDIE_LOG_TO_STDOUT": "server:true",
        "MINDIE_LOG_TO_FILE": "llm:false",
        "MINDIE_LOG_PATH": f"server:{daemon.root}/elsewhere;*:{daemon.root}",
        "MINDIE_LOG_LEVEL": "server:info;llm:loud",
        "LOG_LEVEL": "debug",
    }
    daemon.start().wait_ready()
    assert daemon.stop() == 0
    (file,) = (daemon.root / "elsewhere" / "log" / "debug").glob(f"mindie-server_{daemon.pid}_*.log")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\[[\d: .-]{23}\] : \[[A-Z]+\] ", line) for line in lines), lines
    assert any("[MIE04W900001] MINDIE_LOG_LEVEL='server:info;llm:loud'" in line for line in lines)
    assert any("LOG_LEVEL (use MINDIE_LOG_LEVEL)" in line for line in lines)
    said = set(daemon.stdout.splitlines())
    assert [line for line in lines if line not in said] == [line for line in lines if SUCCESS in line]
    assert SUCCESS in said
    assert "business plane" not in daemon.stderr and "no weights loaded" in daemon.stderr
    assert not (daemon.root / "log").exists()


def test_the_reason_of_a_refused_start_is_in_the_log_file_and_in_the_audit_log(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon(merge(MOCK, {"ServerConfig": {"port": 80}}))
    assert daemon.start().wait() == 1
    assert "[MIE04E110000] " in daemon.log(MAIN) and "ServerConfig.port=80" in daemon.log(MAIN)
    assert daemon.stderr.count("ServerConfig.port=80") == 1
    assert "[start mindie server] [fail]" in daemon.log(AUDIT)


def test_a_check_of_the_configuration_makes_no_files(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK)
    assert daemon.start("--check-config").wait() == 0
    assert not (daemon.root / "log").exists()


def stop_parent(daemon: Daemon) -> int:
    """Of a daemon that runs below a shell: the shell ends with its exit code."""
    found = re.search(r"role=endpoint pid=(\d+)", daemon.log(MAIN))
    assert found
    os.kill(psutil.Process(int(found[1])).ppid(), signal.SIGTERM)
    return daemon.wait()
