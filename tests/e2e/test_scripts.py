"""The measuring scripts against the running daemon: the shipped model's accuracy, the serving benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.harness import HOST, REPO, Daemon


def run_script(server: Daemon, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tls = [f"--{option}={server.client_dir / file}" for option, file in
           (("cacert", "ca.pem"), ("cert", "client.pem"), ("key", "client.key.pem"))]  # fmt: skip
    return subprocess.run(
        [sys.executable, REPO / "scripts" / name, f"--url=https://{HOST}:{server.port}", *tls, *arguments],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_the_shipped_model_solves_what_it_claims(https_server: Daemon, tmp_path: Path) -> None:
    result = tmp_path / "accuracy.json"
    done = run_script(https_server, "eval_accuracy.py", "--min-accuracy=0.9", f"--json={result}")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert figures["accuracy"] >= 0.9 and figures["total"] == 500


def test_the_benchmark_counts_every_token(https_server: Daemon, tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    done = run_script(
        https_server, "bench_serving.py", "--vocab-size=2000", "--input-len=32", "--output-len=16",
        "--concurrency=1,4", "--requests=8", "--repeats=1", f"--daemon-pid={https_server.pid}",
        f"--json={result}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TTFT ms p50" in done.stdout and "endpoint us/token" in done.stdout
    text = result.read_text()
    assert '"failed": 0' in text and json.loads(text)
