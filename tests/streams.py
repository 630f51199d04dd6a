"""Clients that read long streams in the background, to be disturbed."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import threading

from tests.harness import Daemon, Json, eventually

LONG: Json = {
    "model": "mindie-tiny",
    "prompt": "Once upon a time",
    "max_tokens": 2000,
    "ignore_eos": True,
    "stream": True,
}
LONG_CONFIG: Json = {
    "BackendConfig": {
        "ScheduleConfig": {"maxIterTimes": 4000},
        "ModelDeployConfig": {"maxSeqLen": 4096},
    }
}


class Stream(threading.Thread):
    """A client in the background that reads one long stream to its end, however that comes."""

    def __init__(self, daemon: Daemon, body: Json = LONG) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self._body = body
        self.started = threading.Event()
        self.received = b""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._daemon.streaming("/v1/completions", self._body) as response:
                while chunk := response.read1():
                    self.received += chunk
                    self.started.set()
        except Exception as error:  # a cut connection is a result here
            self.error = error
        self.started.set()


class Reading(threading.Thread):
    """Reads a begun answer in the background, as a client has to: one that does not read is ended."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        super().__init__(daemon=True)
        self._response = response
        # grows in place: copied with every piece, it would soon be a client that does not keep up
        self.received = bytearray()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while chunk := self._response.read1():
                self.received += chunk

    def more(self) -> None:
        """Wait for something that has not come yet."""
        before = len(self.received)
        eventually(lambda: len(self.received) > before, 30, "the stream goes on")

    def whole(self) -> bytes:
        """All of it, once it has ended."""
        self.join(30)
        assert not self.is_alive(), "the stream does not end"
        return bytes(self.received)

    def hang_up(self, connection: http.client.HTTPConnection) -> None:
        if self.is_alive() and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self.join(30)


def take_refused(waiting: list[http.client.HTTPConnection]) -> None:
    """Wait until one of these is answered, with a refusal, and take it out of the list."""
    (ready, *others), _, _ = select.select([connection.sock for connection in waiting], [], [], 30)
    assert not others, "only one was too many"
    connection = next(one for one in waiting if one.sock is ready)
    waiting.remove(connection)
    response = connection.getresponse()
    assert response.status == 503 and 1 <= int(response.headers["Retry-After"]) <= 60
