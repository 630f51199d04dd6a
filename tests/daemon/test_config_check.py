"""--check-config: what a start would refuse, without starting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.config_home import REPO, Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.put_tls_files()
    return home


def check(home: Home) -> subprocess.CompletedProcess[str]:
    home.put("conf/config.json", json.dumps(home.document), 0o640)
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from daemon.main import main; sys.exit(main())",
            "--check-config",
        ],
        cwd=REPO,
        env={**os.environ, "MINDIE_LLM_HOME_PATH": str(home.root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_good_set_is_valid(home: Home) -> None:
    done = check(home)
    assert done.returncode == 0, done.stderr
    assert f"{home.file} is valid" in done.stderr


def test_a_broken_certificate_is_not_valid(home: Home) -> None:
    broken = home.put("security/certs/metrics/server.pem", "no certificate")
    done = check(home)
    assert done.returncode == 1
    assert f"[tls] ServerConfig.metricsTlsCert={broken}: cannot be read" in done.stderr
    assert "is valid" not in done.stderr and "Traceback" not in done.stderr
