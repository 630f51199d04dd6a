"""What is no HTTP request gets the canonical error object too, and no word about the libraries in use."""

from __future__ import annotations

import http.client
import json
import socket
from io import BytesIO
from typing import cast

import pytest

from tests.harness import HOST, Daemon

LONG = b"X-Long: " + b"y" * 9000


class _Bytes:
    """As much of a socket as http.client reads from."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> BytesIO:
        assert mode == "rb"
        return BytesIO(self._raw)


def raw_answer(port: int, message: bytes) -> http.client.HTTPResponse:
    """The answer, read until the server closes the connection, which it must."""
    with socket.create_connection((HOST, port), timeout=30) as sock:
        sock.sendall(message)
        raw = b"".join(iter(lambda: sock.recv(65536), b""))
    response = http.client.HTTPResponse(cast(socket.socket, _Bytes(raw)))
    response.begin()
    return response


@pytest.mark.parametrize(
    "head",
    [
        b"hello\r\n\r\n",
        b"post /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nBad Name: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + LONG + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS on a plain port
    ],
)
def test_malformed_requests_get_the_error_object(server: Daemon, head: bytes) -> None:
    response = raw_answer(server.port, head)
    body = json.loads(response.read())
    assert response.status == 400
    assert response.headers["Server"] == "MindIE Server"
    assert response.headers["Content-Type"].startswith("application/json")
    assert body["error"] and (body["error_type"], body["type"]) == ("Bad Request", "Bad Request")
    assert "yyy" not in body["error"]


def test_an_expectation_that_is_not_met_gets_it_too(server: Daemon) -> None:
    connection = server.connect()
    connection.request("POST", "/v1/completions", b"{}", {"Expect": "tea"})
    response = connection.getresponse()
    assert response.status == 417
    assert set(json.loads(response.read())) == {"error", "error_type", "type"}
    assert response.headers["RequestUUID"]
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    connection.close()
