"""A daemon of a script's own: plain HTTP, free ports, a temporary directory, gone when the script is done."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_MODEL = REPOSITORY / "models" / "mindie-tiny"
HOST = "127.0.0.1"
NAME = "mindie-tiny"
_SUCCESS = b"Daemon start success!"
_STARTS_WITHIN_S = 120.0
_LAUNCH = (
    f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from daemon.launch import main; sys.exit(main())"
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OwnDaemon:
    pid: int
    port: int
    endpoint: psutil.Process
    log_file: Path


def configuration(changes: Mapping[str, Any], *, mock: bool, model: Path = TINY_MODEL) -> Json:
    """The stock configuration over plain HTTP on free ports, with nested `changes` merged in.

    `mock`: StandardMock, which echoes prompts and needs no weights.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for sock in sockets:
            sock.bind((HOST, 0))
        port, management_port, metrics_port = (sock.getsockname()[1] for sock in sockets)
    stock: Json = json.loads((REPOSITORY / "config.json").read_text(encoding="utf-8"))
    stock["ServerConfig"] |= {
        "ipAddress": HOST, "port": port, "managementIpAddress": HOST, "managementPort": management_port,
        "metricsPort": metrics_port, "httpsEnabled": False,
    }  # fmt: skip
    stock["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0] |= {
        "modelInstanceType": "StandardMock" if mock else "Standard",
        "modelName": NAME,
        "modelWeightPath": str(model.resolve()),
    }
    return _merge(stock, changes)


def _merge(into: Json, changes: Mapping[str, Any]) -> Json:
    result = copy.deepcopy(into)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if nested else value
    return result


@contextlib.contextmanager
def own_daemon(config: Json) -> Iterator[OwnDaemon]:
    """Start it, wait until it serves, stop it. Raises RuntimeError with its log when it does not start."""
    with tempfile.TemporaryDirectory(prefix="own_daemon_") as folder:
        root = Path(folder)
        (root / "conf").mkdir()
        file = root / "conf" / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        file.chmod(0o640)
        environ = {"MINDIE_LOG_PATH": f"{folder}/logs", **os.environ, "MINDIE_LLM_HOME_PATH": folder}
        with (root / "out").open("wb") as out, (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH], cwd=root, env=environ, stdin=subprocess.DEVNULL,
                stdout=out, stderr=log,
            )  # fmt: skip
        previous = signal.signal(signal.SIGTERM, _end)
        try:
            _wait_ready(process, root)
            yield OwnDaemon(
                process.pid, config["ServerConfig"]["port"], _endpoint_of(process.pid), root / "log"
            )
        finally:
            signal.signal(signal.SIGTERM, previous)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()


def _end(number: int, frame: object) -> None:
    """By default the script would be gone at once, and leave its daemon behind."""
    sys.exit(128 + number)


def _wait_ready(process: subprocess.Popen[bytes], root: Path) -> None:
    until = time.monotonic() + _STARTS_WITHIN_S
    while _SUCCESS not in (root / "out").read_bytes():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the daemon did not start:\n{(root / 'log').read_text(encoding='utf-8')}")
        time.sleep(0.05)


def _endpoint_of(pid: int) -> psutil.Process:
    """The child that listens."""
    children = psutil.Process(pid).children()
    return next(child for child in children if child.net_connections("tcp"))
