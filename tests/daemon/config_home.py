"""An installation directory that a configuration can be tried in, without starting anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from daemon.config import load_settings
from daemon.config_report import ConfigError
from engine.settings import ServerSettings

REPO = Path(__file__).resolve().parents[2]
STOCK_CONFIG = REPO / "config.json"

# What each plane's certificate set is made of; contents do not matter to the configuration.
TLS_FILES = (
    "security/ca/ca.pem",
    "security/ca/management_ca.pem",
    "security/ca/metrics_ca.pem",
    *(f"security/{folder}/server_crl.pem" for folder in ("certs", "management/certs", "metrics/certs")),
    *(f"security/certs/{plane}server.pem" for plane in ("", "management/", "metrics/")),
    *(f"security/keys/{plane}server.key.pem" for plane in ("", "management/", "metrics/")),
)

Json = dict[str, Any]


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
        self.put("models/mindie-tiny/model.safetensors", "weights")
        self.model_dir.chmod(0o750)

    def put(self, name: str, text: str = "x", mode: int = 0o600) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def put_tls_files(self) -> None:
        for name in TLS_FILES:
            self.put(name)

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
