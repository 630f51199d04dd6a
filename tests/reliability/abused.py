"""A daemon that is abused, and what must be true of it afterwards: rows A01 to A33 of the abuse table.

The daemon is the mock, with the tokenizer and the template of the shipped model: everything is real but the
arithmetic. It logs at DEBUG. Hostile text holds MARK, so that a search finds where it went.
"""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.endpoints import ENDPOINTS, NAME, Endpoint
from tests.harness import HOST, TINY_MODEL, Answer, Daemon, Installation, Json, merge, model_config

MARK = "c4n4ryM4RK"
COMPLETIONS = ENDPOINTS["completions"]
CHAT = ENDPOINTS["chat"]
KINDS = {
    400: "Bad Request", 404: "NotFoundError", 405: "Method Not Allowed", 413: "Request Entity Too Large",
    422: "Input Validation Error", 424: "Generation Error", 500: "Incomplete Generation",
    503: "Service Unavailable",
}  # fmt: skip
_LOG_LINE = re.compile(
    r"\[\d{4}-\d\d-\d\d [\d:]{8}\.\d{3}\] \[\d+\] \[\d+\] \[\w+\] \[[A-Z]+\] \[[\w.]+-\d+\] : .+"
)


@contextmanager
def abused(
    installation: Installation, changes: Json | None = None, *, https: bool = False
) -> Iterator[Daemon]:
    """A running daemon, which afterwards stops in order and has told nothing of what clients sent."""
    model = model_config(modelName=NAME, modelWeightPath=str(TINY_MODEL), modelInstanceType="StandardMock")
    daemon = installation.daemon(merge(model, changes or {}), https=https)
    daemon.environ["MINDIE_LOG_LEVEL"] = "DEBUG"
    daemon.start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    assert_told_nothing(daemon)


def assert_told_nothing(daemon: Daemon) -> None:
    """Every line of the log is a line of ours, and none holds a client's text.

    The audit log is no part of this: it tells the paths that were asked for, as they came.
    """
    for path in daemon.root.rglob("*.log"):
        if path.parent.name != "security":
            assert MARK not in path.read_text(encoding="utf-8"), path
    for line in daemon.stderr.splitlines():
        assert MARK not in line
        assert _LOG_LINE.fullmatch(line), line
        assert line.isprintable(), line


def assert_served(daemon: Daemon, endpoint: Endpoint = COMPLETIONS) -> None:
    answer = endpoint.ask(daemon, max_tokens=2)
    assert answer.status == 200, answer.body


def refusal(answer: Answer, *statuses: int) -> str:
    """The text of an answer that must be the canonical error object with one of these statuses."""
    assert answer.status in statuses, (answer.status, answer.body[:500])
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert body["error_type"] == body["type"] == KINDS[answer.status], body
    text = body["error"]
    assert isinstance(text, str) and text
    return text


def exchange(port: int, message: bytes) -> Answer:
    """Send bytes as they are and read one answer."""
    with socket.create_connection((HOST, port), timeout=30) as sock:
        sock.sendall(message)
        return read_answer(sock)


def read_answer(sock: socket.socket) -> Answer:
    response = http.client.HTTPResponse(sock)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def post(path: bytes, body: bytes, *headers: bytes) -> bytes:
    """The bytes of a POST; `path` and `headers` go out unchecked."""
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join([b"POST " + path + b" HTTP/1.1", b"Host: x", length, *headers, b"", body])
