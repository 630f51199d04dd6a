"""Starts the real daemon as a user would: an installation directory, its config, its command."""

from __future__ import annotations

import contextlib
import copy
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[1]
TINY_MODEL = REPO / "models" / "mindie-tiny"
SUCCESS = "Daemon start success!"
HOST = "127.0.0.1"

Json = dict[str, Any]
Children = Callable[..., list[psutil.Process]]  # of the fixture `children`


# below those the kernel gives away on its own, which it might between our look and the daemon's bind; begun
# somewhere else in every process, so that tests running at the same time stay out of each other's way
_FIRST_PORT, _LAST_PORT = 10_000, 32_000
_next_ports = itertools.count(random.Random(os.getpid()).randrange(_LAST_PORT - _FIRST_PORT))


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, all different, and not given to this process before."""
    ports: list[int] = []
    while len(ports) < count:
        port = _FIRST_PORT + next(_next_ports) % (_LAST_PORT - _FIRST_PORT)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((HOST, port))
            ports.append(port)
    return ports


def merge(into: Json, changes: Json) -> Json:
    """`into` with nested `changes` applied; lists are replaced as a whole."""
    result = copy.deepcopy(into)
    for key, value in changes.items():
        result[key] = merge(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def stock_config() -> Json:
    config: Json = json.loads((REPO / "config.json").read_text(encoding="utf-8"))
    return config


def model_config(**changes: Any) -> Json:
    """Changes to BackendConfig.ModelDeployConfig.ModelConfig[0]."""
    model = stock_config()["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    return {"BackendConfig": {"ModelDeployConfig": {"ModelConfig": [{**model, **changes}]}}}


def eventually(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Daemon:
    """One installation directory and the daemon started from it."""

    root: Path
    https: bool
    port: int
    management_port: int
    metrics_port: int
    process: subprocess.Popen[bytes] | None = None
    environ: dict[str, str] = field(default_factory=dict)

    # -- life ---------------------------------------------------------------------------------------

    def start(
        self, *arguments: str, new_group: bool = False, new_session: bool = False, shell: str = ""
    ) -> Daemon:
        """Start without waiting.

        `new_group`: a process group of its own, as a shell's foreground job has. `shell`: what a shell line
        has after the command, such as a redirection.
        """
        command = ["./bin/mindieservice_daemon", *arguments]
        if shell:
            command = ["bash", "-c", f"./bin/mindieservice_daemon {shell}"]
        environ = {
            **os.environ,
            "MINDIE_LOG_LEVEL": "INFO",
            "MINDIE_LOG_PATH": str(self.root),
            **self.environ,
        }
        with (self.root / "stdout.log").open("wb") as out, (self.root / "stderr.log").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                start_new_session=new_session,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environ,
                preexec_fn=os.setpgrp if new_group else None,
            )
        return self

    def wait_ready(self, timeout_s: float = 60.0) -> Daemon:
        def ready_or_dead() -> bool:
            return SUCCESS in self.stdout or self.popen.poll() is not None

        eventually(ready_or_dead, timeout_s, "success line")
        assert SUCCESS in self.stdout, f"exit code {self.popen.poll()}:\n{self.stderr}"
        return self

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.popen.wait(timeout_s)

    def stop(self) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        return self.wait()

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def stdout(self) -> str:
        return (self.root / "stdout.log").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.root / "stderr.log").read_text(encoding="utf-8")

    def log(self, name: str) -> str:
        """What all processes wrote to files of this name: mindie-llm-request, security/mindie-server."""
        folder, _, stem = name.rpartition("/")
        files = sorted((self.root / "log" / (folder or "debug")).glob(f"{stem}_*.log"))
        return "".join(file.read_text(encoding="utf-8") for file in files)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children()

    def child(self, role: str) -> psutil.Process:
        """The newest child whose start was logged with `role=<role>`."""
        for line in reversed(self.stderr.splitlines()):
            if f"role={role}" in line and "started" in line:
                return psutil.Process(int(line.split("pid=")[1].split()[0]))
        raise AssertionError(f"no {role} in the log")

    def leftovers(self) -> set[str]:
        """What this daemon has left behind: processes in its directory, shared memory, socket directories."""
        found = set()
        for process in psutil.process_iter(["name", "status"]):
            named = (process.info["name"] or "").startswith("mindieservice_d")
            if named and process.info["status"] != psutil.STATUS_ZOMBIE:
                with contextlib.suppress(psutil.Error):
                    if process.cwd() == str(self.root):
                        found.add(f"process {process.pid}")
        for place in ("/dev/shm", tempfile.gettempdir()):
            found |= {str(path) for path in Path(place).glob(f"mindie_*_{self.pid}_*")}
        return found

    # -- talking to it ------------------------------------------------------------------------------

    @property
    def client_dir(self) -> Path:
        return self.root / "security" / "client"

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.client_dir / "ca.pem"))
        context.load_cert_chain(self.client_dir / "client.pem", self.client_dir / "client.key.pem")
        return context

    def connect(
        self, port: int | None = None, address: str = HOST, timeout_s: float = 60.0
    ) -> http.client.HTTPConnection:
        port = port or self.port
        if self.https:
            return http.client.HTTPSConnection(address, port, timeout=timeout_s, context=self.tls())
        return http.client.HTTPConnection(address, port, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: Json | bytes | None = None,
        port: int | None = None,
        timeout_s: float = 60.0,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = self.connect(port, timeout_s=timeout_s)
        try:
            raw = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def manage(self, path: str) -> Answer:
        return self.request("GET", path, port=self.management_port)

    def post(self, path: str, body: Json | bytes) -> Answer:
        return self.request("POST", path, body)

    @contextlib.contextmanager
    def streaming(self, path: str, body: Json) -> Iterator[http.client.HTTPResponse]:
        connection = self.connect()
        try:
            connection.request("POST", path, json.dumps(body).encode())
            yield connection.getresponse()
        finally:
            connection.close()

    def frames(self, path: str, body: Json) -> list[str]:
        """The payloads of all SSE frames of a streamed answer."""
        with self.streaming(path, body) as response:
            assert response.status == 200, response.read()
            return sse_payloads(response.read())


def sse_payloads(raw: bytes) -> list[str]:
    text = raw.decode("utf-8")
    assert text.endswith("\n\n"), text[-80:]
    frames = text[:-2].split("\n\n")
    for frame in frames:
        assert frame.startswith("data:") and "\n" not in frame, frame
    return [frame.removeprefix("data:").strip() for frame in frames]


class Installation:
    """Makes installation directories; certificates are made once and copied, as they take seconds."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._certificates = base / "certificates"
        self._count = 0

    def daemon(self, changes: Json | None = None, *, https: bool = False, model: Path = TINY_MODEL) -> Daemon:
        """A daemon ready to `start`, on free ports, with `changes` merged into the stock config."""
        self._count += 1
        root = self._base / f"daemon{self._count}"
        (root / "bin").mkdir(parents=True)
        (root / "conf").mkdir()
        launcher = root / "bin" / "mindieservice_daemon"
        launcher.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPO)!r})\n"
            "from daemon.launch import main\nsys.exit(main())\n"
        )
        launcher.chmod(0o550)
        port, management_port, metrics_port = free_ports(3)
        server = {
            "port": port, "managementIpAddress": HOST, "managementPort": management_port,
            "metricsPort": metrics_port, "httpsEnabled": https,
        }  # fmt: skip
        config = merge(stock_config(), {"ServerConfig": server})
        config = merge(config, model_config(modelWeightPath=str(model), modelName="mindie-tiny"))
        write_config(root, merge(config, changes or {}))
        if https:
            shutil.copytree(self._ensure_certificates(), root / "security")
        return Daemon(root, https, port, management_port, metrics_port)

    def _ensure_certificates(self) -> Path:
        if not self._certificates.exists():
            script = REPO / "scripts" / "make_certs.py"
            subprocess.run(
                [sys.executable, script, "--dir", self._certificates], check=True, capture_output=True
            )
        return self._certificates


def write_config(root: Path, config: Json) -> None:
    path = root / "conf" / "config.json"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    path.chmod(0o640)
