"""An installation directory that a configuration can be tried in, without starting anything."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from daemon.config import load_settings
from daemon.config_report import ConfigError
from engine.settings import ServerSettings

REPO = Path(__file__).resolve().parents[2]
STOCK_CONFIG = REPO / "config.json"
TINY_MODEL = REPO / "models" / "mindie-tiny"

# What each plane's certificate set is made of.
TLS_FILES = (
    "security/ca/ca.pem",
    "security/ca/management_ca.pem",
    "security/ca/metrics_ca.pem",
    *(f"security/{folder}/server_crl.pem" for folder in ("certs", "management/certs", "metrics/certs")),
    *(f"security/certs/{plane}server.pem" for plane in ("", "management/", "metrics/")),
    *(f"security/keys/{plane}server.key.pem" for plane in ("", "management/", "metrics/")),
)

Json = dict[str, Any]


def load_make_certs() -> ModuleType:
    """A fresh copy of scripts/make_certs.py, which may be patched."""
    spec = importlib.util.spec_from_file_location("make_certs", REPO / "scripts" / "make_certs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _tls_contents() -> dict[str, bytes]:
    """Made once, with one key for all certificates, because making keys takes long."""
    make_certs = load_make_certs()
    key = make_certs._new_key()
    make_certs._new_key = lambda: key  # type: ignore[attr-defined]
    return {f"security/{name}": content for name, content in make_certs.make_all(825, ["127.0.0.1"]).items()}


def deny(monkeypatch: pytest.MonkeyPatch, directory: Path, error: type[OSError] = PermissionError) -> None:
    """Everything below `directory` as another user's; a real one would not stop root."""
    stat, lstat = os.stat, os.lstat

    def guarded(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def call(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            if not isinstance(path, int) and directory in Path(os.fsdecode(path)).parents:
                number = errno.EACCES if error is PermissionError else errno.ENOENT
                raise OSError(number, os.strerror(number), os.fsdecode(path))
            return real(path, *args, **kwargs)

        return call

    accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10's Path has its own way to them
    for owner in filter(None, (os, accessor)):
        for name, real in (("stat", stat), ("lstat", lstat)):
            if hasattr(owner, name):
                call = guarded(real)
                monkeypatch.setattr(owner, name, staticmethod(call) if owner is accessor else call)


class Home:
    """`document` may be changed freely before each load."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.document: Json = json.loads(STOCK_CONFIG.read_text(encoding="utf-8"))
        self.environ: dict[str, str] = {}
        self.file = root / "conf" / "config.json"
        self.model_dir = root / "models" / "mindie-tiny"
        self._make_model()

    def _make_model(self) -> None:
        config = {"model_type": "qwen2", "vocab_size": 100, "torch_dtype": "float32"}
        self.put("models/mindie-tiny/config.json", json.dumps(config))
        self.put("models/mindie-tiny/tokenizer.json", "{}")
        self.put("models/mindie-tiny/model.safetensors", "\x02" + 7 * "\0" + "{}")  # of no tensors
        self.model_dir.chmod(0o750)

    def put(self, name: str, text: str = "x", mode: int = 0o600) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def use_real_model(self) -> None:
        """Put the model that ships in the place of the one that only looks like one."""
        shutil.rmtree(self.model_dir)
        shutil.copytree(TINY_MODEL, self.model_dir)
        for path in self.model_dir.iterdir():
            path.chmod(0o640)
        self.model_dir.chmod(0o750)

    def put_tls_files(self) -> None:
        for name in TLS_FILES:
            self.put(name, _tls_contents()[name].decode())

    @property
    def server(self) -> Json:
        section: Json = self.document["ServerConfig"]
        return section

    @property
    def backend(self) -> Json:
        section: Json = self.document["BackendConfig"]
        return section

    @property
    def deploy(self) -> Json:
        section: Json = self.backend["ModelDeployConfig"]
        return section

    @property
    def model(self) -> Json:
        section: Json = self.deploy["ModelConfig"][0]
        return section

    @property
    def schedule(self) -> Json:
        section: Json = self.backend["ScheduleConfig"]
        return section

    def load(self) -> ServerSettings:
        return self.load_text(json.dumps(self.document))

    def load_text(self, text: str) -> ServerSettings:
        self.put("conf/config.json", text, 0o640)
        return self.load_file()

    def load_file(self) -> ServerSettings:
        """Whatever lies there now."""
        return load_settings(None, self.environ, self.root / "bin" / "mindieservice_daemon")

    def findings(self) -> tuple[str, ...]:
        """The findings of a configuration that must be refused."""
        try:
            self.load()
        except ConfigError as error:
            return error.findings
        raise AssertionError("the configuration was accepted")

    def only_finding(self) -> str:
        findings = self.findings()
        assert len(findings) == 1, findings
        return findings[0]

    def warning(self, part: str) -> str:
        """The one warning that holds `part`."""
        found = [warning for warning in self.load().warnings if part in warning]
        assert len(found) == 1, found
        return found[0]

    def note(self, part: str) -> str:
        """The one note that holds `part`."""
        found = [note for note in self.load().notes if part in note]
        assert len(found) == 1, found
        return found[0]
