"""Clients that read long streams in the background, to be disturbed."""

from __future__ import annotations

import http.client
import select
import threading

from tests.harness import Daemon, Json

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


def take_refused(waiting: list[http.client.HTTPConnection]) -> None:
    """Wait until one of these is answered, with a refusal, and take it out of the list."""
    (ready, *others), _, _ = select.select([connection.sock for connection in waiting], [], [], 30)
    assert not others, "only one was too many"
    connection = next(one for one in waiting if one.sock is ready)
    waiting.remove(connection)
    response = connection.getresponse()
    assert response.status == 503 and 1 <= int(response.headers["Retry-After"]) <= 60
