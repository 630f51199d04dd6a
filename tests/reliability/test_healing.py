"""Deaths and hangs of children while requests run: what clients see, and how the service comes back."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from engine.wire.sizes import PROMPT_SLOTS
from tests.harness import HOST, TINY_MODEL, Daemon, Json, eventually, merge, model_config, sse_payloads
from tests.streams import LONG, LONG_CONFIG, Stream

MakeDaemon = Callable[..., Daemon]

FLOAT32: Json = merge(LONG_CONFIG, {"BackendConfig": {"runtimeConfig": {"dtype": "float32"}}})
MOCK: Json = merge(
    LONG_CONFIG,
    model_config(modelInstanceType="StandardMock", modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL)),
)
KINDS: dict[str, Json] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 11, "prompt": "A dog and a cat"},
    "penalties": {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.1, "frequency_penalty": 0.3},
    "choices": {"n": 3, "temperature": 1.0, "seed": 3},
    "scores": {"temperature": 0, "logprobs": 2, "prompt": "Two birds"},
}


def body_of(kind: str, max_tokens: int) -> Json:
    return {**LONG, "max_tokens": max_tokens, **KINDS[kind]}


def texts(payloads: list[str]) -> dict[int, str]:
    """The text of each choice, out of the frames of a completion."""
    assert payloads[-1] == "[DONE]", payloads[-3:]
    found: dict[int, str] = {}
    for payload in payloads[:-1]:
        frame = json.loads(payload)
        assert "error" not in frame, payload
        for choice in frame["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


def ends_with_an_error(stream: Stream) -> bool:
    payloads = sse_payloads(stream.received)
    return '"error"' in payloads[-2] and payloads[-1] == "[DONE]"


def status(daemon: Daemon, path: str = "/v2/health/ready") -> int:
    """0 while nobody answers."""
    try:
        return daemon.manage(path).status
    except OSError:
        return 0


def serves_again(daemon: Daemon, timeout_s: float = 60.0) -> None:
    eventually(lambda: status(daemon) == 200, timeout_s, "ready again")
    answer = daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "Hi", "max_tokens": 3})
    assert answer.status == 200, answer.body


def mentions(daemon: Daemon, *words: str) -> list[str]:
    return [line for line in daemon.stderr.splitlines() if all(word in line for word in words)]


def free_blocks(daemon: Daemon) -> int:
    resource = daemon.manage("/v1/status").json()["resource"]
    return int(resource["availBlockNum"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_F01_F06_P13_streams_go_on_with_the_same_bytes_after_the_worker_died(
    make_daemon: MakeDaemon, number: signal.Signals
) -> None:
    daemon = make_daemon(FLOAT32).start().wait_ready()
    bodies = {kind: body_of(kind, 120) for kind in KINDS}
    undisturbed = {kind: texts(daemon.frames("/v1/completions", body)) for kind, body in bodies.items()}
    streams = [(kind, Stream(daemon, bodies[kind])) for kind in KINDS for _ in range(10)]
    assert all(stream.started.wait(60) for _, stream in streams)
    died = daemon.child("worker")
    died.send_signal(number)
    eventually(lambda: status(daemon) == 503, 10.0, "not ready")
    assert status(daemon, "/v2/health/live") == 200  # it heals
    refused = daemon.post("/v1/completions", {"model": "mindie-tiny", "prompt": "Hi"})
    assert refused.status in (200, 503)  # unless it is back already
    for kind, stream in streams:
        stream.join(100)
        assert texts(sse_payloads(stream.received)) == undisturbed[kind], kind
    serves_again(daemon)
    assert mentions(daemon, "[ERROR]", "role=worker", "died", number.name)
    assert mentions(daemon, "role=worker", "serves again")
    assert daemon.child("worker").pid != died.pid and daemon.child("worker").ppid() == daemon.pid
    assert not any(name for name in daemon.leftovers() if not name.startswith("process"))
    assert daemon.stop() == 0


def test_F01_structured_answers_go_on_after_the_worker_died(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(FLOAT32).start().wait_ready()
    schema = {
        "type": "object",
        "properties": {"words": {"type": "array", "items": {"type": "string"}, "minItems": 60}},
        "required": ["words"],
    }
    body = {**LONG, "max_tokens": 900, "temperature": 0, "json": schema, "ignore_eos": False}
    undisturbed = texts(daemon.frames("/v1/completions", body))
    stream = Stream(daemon, body)
    assert stream.started.wait(60)
    daemon.child("worker").kill()
    stream.join(100)
    assert texts(sse_payloads(stream.received)) == undisturbed
    assert daemon.stop() == 0


def test_F01_other_instances_take_over(make_daemon: MakeDaemon) -> None:
    two = {"BackendConfig": {"modelInstanceNumber": 2, "npuDeviceIds": [[0], [1]]}}
    daemon = make_daemon(merge(MOCK, two)).start().wait_ready()
    streams = [Stream(daemon, {**LONG, "max_tokens": 3900}) for _ in range(6)]
    assert all(stream.started.wait(30) for stream in streams)
    daemon.child("worker").kill()
    for stream in streams:
        stream.join(60)
        assert len(texts(sse_payloads(stream.received))[0]) > 3000
    eventually(lambda: mentions(daemon, "role=worker", "serves again"), 30.0, "both serve")
    assert status(daemon) == 200 and daemon.stop() == 0


def test_F02_a_stopped_worker_is_replaced_and_its_streams_go_on(make_daemon: MakeDaemon) -> None:
    impatient = {"BackendConfig": {"runtimeConfig": {"stepTimeoutSec": 1}}}
    daemon = make_daemon(merge(MOCK, impatient)).start().wait_ready()
    undisturbed = texts(daemon.frames("/v1/completions", {**LONG, "max_tokens": 3900}))
    stream = Stream(daemon, {**LONG, "max_tokens": 3900})
    assert stream.started.wait(30)
    worker = daemon.child("worker")
    worker.suspend()
    stream.join(60)
    assert texts(sse_payloads(stream.received)) == undisturbed
    assert not worker.is_running()  # there is nothing left that SIGCONT could wake
    assert mentions(daemon, "[ERROR]", "role=worker", "no progress", "stepTimeoutSec")
    serves_again(daemon)
    assert daemon.stop() == 0


def test_F02_more_requests_than_the_ring_holds_go_on_after_a_hang(make_daemon: MakeDaemon) -> None:
    """Those that wait for a place on the ring of a stopped worker must not reach its successor too early."""
    impatient = {"BackendConfig": {"runtimeConfig": {"stepTimeoutSec": 1}}}
    daemon = make_daemon(merge(MOCK, impatient)).start().wait_ready()
    body = {**LONG, "max_tokens": 20}
    undisturbed = texts(daemon.frames("/v1/completions", body))
    daemon.child("worker").suspend()
    streams = [Stream(daemon, body) for _ in range(PROMPT_SLOTS + 40)]
    for stream in streams:
        stream.join(60)
        assert texts(sse_payloads(stream.received)) == undisturbed
    assert len(mentions(daemon, "[ERROR]", "role=worker", "died")) == 1
    assert daemon.stop() == 0


def test_F02_a_pause_of_everybody_is_nobodys_fault(make_daemon: MakeDaemon) -> None:
    """Ctrl+Z and fg: all deadlines have passed, yet all are well."""
    impatient = {"BackendConfig": {"runtimeConfig": {"stepTimeoutSec": 1}}}
    daemon = make_daemon(merge(MOCK, impatient)).start().wait_ready()
    family = [psutil.Process(daemon.pid), *daemon.children()]
    for process in family:
        process.suspend()
    time.sleep(3.0)  # the deadlines are real time
    for process in family:
        process.resume()
    serves_again(daemon)
    assert [process.pid for process in daemon.children()] == [process.pid for process in family[1:]]
    assert daemon.stop() == 0


def test_F03_a_request_seen_in_two_crashes_fails_and_the_rest_go_on(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    suspect = Stream(daemon, {**LONG, "max_tokens": 3900})
    assert suspect.started.wait(30)
    daemon.child("worker").kill()
    eventually(lambda: mentions(daemon, "role=worker", "serves again"), 60.0, "healed")
    read = len(suspect.received)
    eventually(lambda: len(suspect.received) > read, 30.0, "the stream goes on")
    bystander = Stream(daemon, {**LONG, "max_tokens": 200})
    assert bystander.started.wait(30)
    daemon.child("worker").kill()
    suspect.join(30)
    assert ends_with_an_error(suspect)
    bystander.join(60)
    assert texts(sse_payloads(bystander.received))[0]
    serves_again(daemon)
    assert daemon.stop() == 0


def test_F01_a_worker_that_dies_again_is_replaced_again(make_daemon: MakeDaemon) -> None:
    """After a pause, so that the doors are opened by what the parent hears meanwhile."""
    daemon = make_daemon(MOCK).start().wait_ready()
    for count in range(1, 4):
        daemon.child("worker").kill()
        eventually(
            lambda n=count: len(mentions(daemon, "role=worker", "serves again")) == n,  # type: ignore[misc]
            30.0,
            "replaced",
        )
        serves_again(daemon)
    assert daemon.stop() == 0


def test_F04_five_deaths_in_a_minute_end_the_service(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK).start().wait_ready()
    for count in range(1, 6):
        eventually(lambda n=count: len(mentions(daemon, "role=worker", "started")) == n, 30.0, "forked")  # type: ignore[misc]
        stream = None
        if count == 5:
            serves_again(daemon)
            stream = Stream(daemon, {**LONG, "max_tokens": 3900})
            assert stream.started.wait(30)
        daemon.child("worker").kill()
        eventually(lambda n=count: len(mentions(daemon, "[ERROR]", "died")) == n, 10.0, "noticed")  # type: ignore[misc]
    assert daemon.wait() == 6
    assert stream is not None
    stream.join(10)
    assert ends_with_an_error(stream)
    (cause,) = mentions(daemon, "[ERROR]", "5 deaths within 60 s")
    assert "role=worker" in cause and "SIGKILL" in cause


def test_F05_P6_a_dead_endpoint_is_replaced_on_the_same_ports(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    worker = daemon.child("worker").pid
    untouched = free_blocks(daemon)
    streams = [Stream(daemon) for _ in range(5)]
    assert all(stream.started.wait(30) for stream in streams)
    died = daemon.child("endpoint")
    died.kill()
    for stream in streams:
        stream.join(10)
        assert stream.error is not None  # its connection died with the process
    serves_again(daemon)
    assert daemon.child("endpoint").pid != died.pid and daemon.child("worker").pid == worker
    assert mentions(daemon, "the endpoint is gone: 5 request(s) dropped")
    eventually(lambda: free_blocks(daemon) == untouched, 10.0, "no block is held for the dropped requests")
    assert daemon.stop() == 0


def test_F05_endpoint_and_worker_die_together(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK).start().wait_ready()
    for roles in (("endpoint", "worker"), ("worker", "endpoint")):
        first, second = (daemon.child(role) for role in roles)
        first.kill()
        second.kill()
        psutil.wait_procs([first, second], timeout=10)
        serves_again(daemon)
    assert daemon.stop() == 0


def test_F05_an_endpoint_that_hangs_is_replaced(make_daemon: MakeDaemon) -> None:
    impatient = {"BackendConfig": {"runtimeConfig": {"stepTimeoutSec": 1}}}
    daemon = make_daemon(merge(MOCK, impatient)).start().wait_ready()
    daemon.child("endpoint").suspend()
    eventually(lambda: mentions(daemon, "role=endpoint", "serves again"), 30.0, "replaced")
    serves_again(daemon)
    assert daemon.stop() == 0


@pytest.mark.parametrize("role", ["worker", "endpoint"])
def test_a_stop_while_a_child_is_being_replaced_is_orderly(make_daemon: MakeDaemon, role: str) -> None:
    daemon = make_daemon(MOCK).start().wait_ready()
    daemon.child(role).kill()
    eventually(lambda: mentions(daemon, f"role={role}", "died"), 10.0, "noticed")
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait(20) == 0
    assert not daemon.leftovers()


def test_P7_deaths_leave_no_descriptors_behind(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK).start().wait_ready()

    def die(role: str) -> None:
        count = len(mentions(daemon, f"role={role}", "serves again"))
        daemon.child(role).kill()
        eventually(lambda: len(mentions(daemon, f"role={role}", "serves again")) > count, 30.0, "healed")
        serves_again(daemon)

    die("worker")
    die("endpoint")
    eventually(lambda: status(daemon) == 200, 10.0, "ready")
    parent = psutil.Process(daemon.pid)
    before = parent.num_fds(), {p.name(): p.num_fds() for p in daemon.children()}
    die("worker")
    die("endpoint")
    # the last hub but one is closed with the next opening of the doors, hence the one more
    assert parent.num_fds() <= before[0] + 3
    children = [p.num_fds() for p in daemon.children()]
    assert max(children) <= max(before[1].values()) + 3
    assert f"http://{HOST}" in daemon.stderr and daemon.stop() == 0


@pytest.mark.slow
def test_P7_what_dead_children_had_started_ends_with_them(make_daemon: MakeDaemon) -> None:
    """The processes that compute masks, of the worker; the one that tries grammars out, of the endpoint."""
    daemon = make_daemon(LONG_CONFIG).start().wait_ready()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    body: Json = {
        "model": "mindie-tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    assert daemon.post("/v1/chat/completions", body).status == 200
    parent = psutil.Process(daemon.pid)
    started = parent.children(recursive=True)
    assert len(started) > len(daemon.children())
    for role in ("worker", "endpoint"):
        daemon.child(role).kill()
        eventually(lambda r=role: mentions(daemon, f"role={r}", "serves again"), 60.0, "healed")  # type: ignore[misc]
        serves_again(daemon)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert daemon.post("/v1/chat/completions", body).status == 200
    assert len(parent.children(recursive=True)) == len(started)
    assert daemon.stop() == 0
