"""Connections that only cost: silent, slow, never reading, far too many. Each costs itself, nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import HOST, TINY_MODEL, Daemon, Installation, Json, eventually, merge, model_config

MakeDaemon = Callable[..., Daemon]

BUSINESS = 16  # connections, of MOST
MOST = 32
LIMITS = {
    "maxConnections": MOST,
    "headTimeoutSec": 1,
    "bodyTimeoutSec": 1,
    "keepAliveSec": 2,
    "writeStallSec": 2,
}
MOCK = model_config(
    modelInstanceType="StandardMock", modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL)
)
BODY = b'{"model": "mindie-tiny", "prompt": "hello", "max_tokens": 4}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
GOOD = HEAD + LENGTH + BODY
PLENTY_S = 30.0


def config(**limits: object) -> Json:
    deploy = {"maxSeqLen": 16384, "maxInputTokenLen": 4096}
    schedule = {"maxIterTimes": 12000, "maxPrefillTokens": 16384}
    backend = {
        "runtimeConfig": {**LIMITS, **limits},
        "ModelDeployConfig": deploy,
        "ScheduleConfig": schedule,
    }
    return merge(MOCK, {"BackendConfig": {**backend, "ModelDeployConfig": {**MOCK_DEPLOY, **deploy}}})


MOCK_DEPLOY = MOCK["BackendConfig"]["ModelDeployConfig"]


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    daemon = installation.daemon(config()).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    assert "Traceback" not in daemon.stderr


@pytest.fixture(autouse=True)
def a_good_request_works_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "daemon" in request.fixturenames:
        assert_serves(request.getfixturevalue("daemon"))


def assert_serves(daemon: Daemon) -> None:
    answer = daemon.post("/v1/completions", BODY)
    assert answer.status == 200, answer.body


def connect(daemon: Daemon, port: int | None = None) -> socket.socket:
    return socket.create_connection((HOST, port or daemon.port), timeout=PLENTY_S)


def rest(sock: socket.socket) -> bytes:
    """Everything until the server closes, which it must."""
    raw = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            raw += chunk
    return raw


def assert_error(raw: bytes, status: int) -> None:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), raw
    assert b"aiohttp" not in head.lower() and b"python" not in head.lower()
    assert set(json.loads(body)) >= {"error", "error_type", "type"}  # and an id, once there was a request


def counted(daemon: Daemon, name: str, **labels: str) -> float:
    answer = daemon.request("GET", "/metrics", port=daemon.metrics_port)
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def closed(daemon: Daemon, cause: str) -> float:
    return counted(daemon, "connections_closed_total", cause=cause)


# -- heads and bodies that do not end ------------------------------------------------------------------


def test_A08_a_silent_connection_is_closed(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        assert rest(sock) == b""


def test_A08_slow_heads_are_closed_with_408(daemon: Daemon) -> None:
    before = closed(daemon, "slow_head")
    with connect(daemon) as sock:
        sock.settimeout(0.1)
        raw = b""
        until = time.monotonic() + PLENTY_S
        for byte in GOOD:
            assert time.monotonic() < until
            with contextlib.suppress(TimeoutError):
                raw = sock.recv(65536)
                break
            sock.sendall(bytes([byte]))  # every byte well before the deadline, which does not move
        assert_error(raw, 408)
    assert closed(daemon, "slow_head") == before + 1


def test_A08_the_second_head_has_a_deadline_too(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        sock.sendall(GOOD)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        sock.sendall(HEAD)
        assert_error(rest(sock), 408)


def test_A05_A08_a_body_without_end_gets_408(daemon: Daemon) -> None:
    before = closed(daemon, "slow_body")
    bodies = (
        b"Content-Length: 1000\r\n\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n8000000000000000\r\n{",
    )
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(daemon)) for _ in bodies]
        for sock, body in zip(socks, bodies, strict=True):
            sock.sendall(HEAD + body)
        for sock in socks:
            assert_error(rest(sock), 408)
    assert closed(daemon, "slow_body") == before + len(bodies)


def test_A08_a_long_answer_outlives_the_deadline_of_its_body(daemon: Daemon) -> None:
    """Whose body came in two pieces, but came."""
    body = json.dumps({**json.loads(BODY), "stream": True, "max_tokens": 4000, "ignore_eos": True}).encode()
    with connect(daemon) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:10])
        time.sleep(0.1)  # so that the head is handled before the body is complete
        sock.sendall(body[10:])
        until = time.monotonic() + 3 * int(LIMITS["bodyTimeoutSec"])
        raw = b""
        while not raw.endswith(b"0\r\n\r\n"):
            chunk = sock.recv(4096)
            assert chunk, raw[-300:]
            raw = raw[-300:] + chunk
            if time.monotonic() < until:
                time.sleep(0.02)
        assert b"[DONE]" in raw


def test_idle_connections_are_kept_for_keepAliveSec_only(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        sock.sendall(GOOD)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        time.sleep(float(LIMITS["headTimeoutSec"]) + 0.6)  # the head's deadline is not the idle one's
        sock.sendall(GOOD)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert rest(sock) == b""


# -- bytes that are no request -------------------------------------------------------------------------

MALFORMED = {
    "two lengths": HEAD + LENGTH[:-2] + b"Content-Length: 5\r\n\r\n" + BODY,
    "length and chunks": HEAD + LENGTH[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two encodings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "bare line feeds": GOOD.replace(b"\r\n", b"\n"),
    "a folded line": HEAD + b"X-A: b\r\n c\r\n" + LENGTH + BODY,
    "a space before the colon": HEAD + b"Content-Length : 2\r\n\r\n{}",
    "a negative chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n",
    "a chunk of 20 digits": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n{}",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length of 2^64": HEAD + b"Content-Length: 18446744073709551616\r\n\r\n",
    "10,000 fields": HEAD + b"".join(b"X-%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
    "a long field": HEAD + b"X: " + b"y" * 9000 + b"\r\n\r\n",
    "NUL in a field": HEAD + b"X: a\0b\r\n\r\n",
    "20,000 trailers": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    + b"X: y\r\n" * 20_000
    + b"\r\n",
}


@pytest.mark.parametrize("attack", MALFORMED)
def test_A05_A07_malformed_requests_get_one_400_and_the_end(daemon: Daemon, attack: str) -> None:
    """Whatever follows on the connection is not answered."""
    with connect(daemon) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(MALFORMED[attack] + GOOD)
        raw = rest(sock)
    assert re.findall(rb"HTTP/1\.[01] (\d+) ", raw) == [b"400"], raw


def test_A05_a_body_in_tiny_chunks_takes_no_memory(daemon: Daemon) -> None:
    """Six bytes on the wire for each: 20 MB make 3.3 million chunks."""
    endpoint = daemon.child("endpoint")
    before = endpoint.memory_info().rss
    peak = 0
    with connect(daemon) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        block = b"1\r\n \r\n" * 50_000
        with contextlib.suppress(ConnectionError):  # a slow machine may meet the deadline of the body
            for _ in range(20_000_000 // len(block)):
                sock.sendall(block)
                peak = max(peak, endpoint.memory_info().rss)
    assert peak - before < 41 << 20  # maxRequestLength and a MiB


# -- clients that do not read --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_A09_a_client_that_never_reads_ends_alone(daemon: Daemon, stream: bool) -> None:
    before = closed(daemon, "stalled")
    body = {"model": "mindie-tiny", "prompt": "x", "max_tokens": 12000, "ignore_eos": True, "stream": stream}
    if not stream:
        body |= {"max_tokens": 3000, "logprobs": 5}
    raw = json.dumps(body).encode()
    endpoint = daemon.child("endpoint")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((HOST, daemon.port))
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
        eventually(lambda: closed(daemon, "stalled") == before + 1, PLENTY_S, "the client is given up")
    slots = "/v2/models/mindie-tiny/getSlotCount"
    eventually(lambda: daemon.manage(slots).status == 200, PLENTY_S, "slots are told")
    metrics = ("num_requests_running", "num_requests_waiting")
    eventually(lambda: not any(counted(daemon, name) for name in metrics), PLENTY_S, "nothing runs")
    assert endpoint.is_running()


def test_A09_a_client_that_reads_too_slowly_is_given_up_before_it_costs_memory(
    make_daemon: MakeDaemon,
) -> None:
    """It takes a byte now and then, so it never stalls; the engine is done long before."""
    daemon = make_daemon(config(writeStallSec=600)).start().wait_ready()
    body = {"model": "mindie-tiny", "prompt": "x", "max_tokens": 12000, "ignore_eos": True, "stream": True}
    raw = json.dumps(body).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PLENTY_S)
        sock.connect((HOST, daemon.port))
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)

        def given_up() -> bool:
            with contextlib.suppress(ConnectionResetError):
                sock.recv(1)
            return closed(daemon, "stalled") == 1

        eventually(given_up, PLENTY_S, "the client is given up")
    assert_serves(daemon)
    assert daemon.stop() == 0


# -- too many ------------------------------------------------------------------------------------------


def test_A10_idle_connections_give_way_to_those_that_ask(daemon: Daemon) -> None:
    endpoint = daemon.child("endpoint")
    before = closed(daemon, "evicted")
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            for _ in range(2 * BUSINESS):
                stack.enter_context(connect(daemon))
            assert_serves(daemon)
            assert daemon.manage("/v2/health/ready").status == 200
            open_now = [c for c in endpoint.net_connections("tcp") if c.laddr.port == daemon.port]
            assert len([c for c in open_now if c.status == psutil.CONN_ESTABLISHED]) <= BUSINESS + 16
    assert closed(daemon, "evicted") > before


def test_A10_a_full_house_refuses_and_leaves_the_other_planes_alone(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(config(bodyTimeoutSec=60)).start().wait_ready()
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(daemon)) for _ in range(BUSINESS)]
        for sock in busy:
            sock.sendall(HEAD + b"Expect: 100-continue\r\n" + LENGTH)
        for sock in busy:  # all wait for an answer by now, and give way to nobody
            assert sock.recv(64).startswith(b"HTTP/1.1 100 ")
        with connect(daemon) as refused:
            refused.sendall(GOOD)
            raw = rest(refused)
            assert_error(raw, 503)
            assert b"\r\nRetry-After: " in raw
        assert daemon.manage("/v2/health/live").status == 200
        assert closed(daemon, "refused") == 1
        assert counted(daemon, "connections_open", plane="business") == BUSINESS
        for sock in busy:
            sock.sendall(BODY)
            assert sock.recv(64).startswith(b"HTTP/1.1 200 ")
    assert_serves(daemon)
    assert daemon.stop() == 0


def test_F27_without_descriptors_accepting_pauses_and_resumes(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(config(headTimeoutSec=60, maxConnections=1_000_000)).start().wait_ready()
    assert "runtimeConfig.maxConnections=1000000: " in daemon.stderr  # more than there are descriptors
    assert_serves(daemon)
    endpoint = daemon.child("endpoint")
    hard = resource.prlimit(endpoint.pid, resource.RLIMIT_NOFILE)[1]
    with contextlib.ExitStack() as stack:
        highest = max(int(entry) for entry in settled_fds(endpoint))
        resource.prlimit(endpoint.pid, resource.RLIMIT_NOFILE, (highest + 4, hard))
        socks = [stack.enter_context(connect(daemon)) for _ in range(12)]
        # the spare descriptor carries the refusal; the idle ones that gave way make room for an honest one
        answers = []
        for sock in socks:
            sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                answers.append(rest(sock))
        assert any(raw.startswith(b"HTTP/1.1 503 ") for raw in answers), answers
        eventually(lambda: serves(daemon), PLENTY_S, "an honest request is served")
    resource.prlimit(endpoint.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert_serves(daemon)
    lines = [line for line in daemon.stderr.splitlines() if "accept: Too many open files" in line]
    assert 1 <= len(lines) <= 4  # of a plane, one in ten seconds
    assert "Traceback" not in daemon.stderr
    assert daemon.stop() == 0


def fds(process: psutil.Process) -> list[str]:
    return os.listdir(f"/proc/{process.pid}/fd")


def settled_fds(process: psutil.Process) -> list[str]:
    """Once the log files that the first request opens are open, and its connection is closed."""
    seen: list[list[str]] = [[]]

    def settled() -> bool:
        time.sleep(0.5)
        seen.append(fds(process))
        return seen[-1] == seen[-2]

    eventually(settled, PLENTY_S, "the descriptors stay the same")
    return seen[-1]


def serves(daemon: Daemon) -> bool:
    with contextlib.suppress(OSError):
        return daemon.request("POST", "/v1/completions", BODY, timeout_s=3.0).status == 200
    return False
