"""Who gets no TLS connection, what that costs, and certificates that change while the service runs."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import (
    HOST,
    REPO,
    TINY_MODEL,
    Daemon,
    Installation,
    eventually,
    merge,
    model_config,
)

SCRIPT = REPO / "scripts" / "make_certs.py"
MOCK = model_config(
    modelInstanceType="StandardMock", modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL)
)
LIMITS = {"maxConnections": 32, "handshakeTimeoutSec": 2}
HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
POLL_S = 30.0  # certificates are looked at every 10 s


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_certs_for_faults", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_certs = _load_script()


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    config = merge(MOCK, {"BackendConfig": {"runtimeConfig": LIMITS}})
    daemon = installation.daemon(config, https=True).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    assert "Traceback" not in daemon.stderr


@pytest.fixture(scope="module")
def strangers(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates `<name>.pem`, `<name>.key.pem`: expired and revoked ones of our CA, one of another CA."""
    directory = tmp_path_factory.mktemp("strangers")
    ours = make_certs.Authority.load(daemon.root / "security")
    other = make_certs.Authority.create(10)
    for name, authority, days in (("expired", ours, 0), ("foreign", other, 10), ("revoked", ours, 10)):
        certificate, key = authority.issue(name, days)
        (directory / f"{name}.pem").write_bytes(certificate)
        (directory / f"{name}.key.pem").write_bytes(key)
    return directory


def context_of(daemon: Daemon, certificate: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(daemon.client_dir / "ca.pem"))
    if certificate is not None:
        context.load_cert_chain(certificate, certificate.with_suffix(".key.pem"))
    return context


def get_models(daemon: Daemon, context: ssl.SSLContext) -> int:
    """The status; raises when there is no TLS. Under TLS 1.3 the verdict comes after the client is done."""
    connection = http.client.HTTPSConnection(HOST, daemon.port, timeout=30, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        return connection.getresponse().status


def failed(daemon: Daemon, cause: str) -> float:
    answer = daemon.request("GET", "/metrics", port=daemon.metrics_port)
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
        if sample.name == "tls_handshakes_failed_total"
        and sample.labels["cause"] == cause
        and sample.labels["plane"] == "business"
    )


def assert_refused(daemon: Daemon, cause: str, attempt: Callable[[], object]) -> None:
    before = failed(daemon, cause)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        attempt()
    eventually(lambda: failed(daemon, cause) == before + 1, 10.0, f"{cause} is counted")
    assert daemon.get("/v1/models").status == 200


def test_A30_plain_http(daemon: Daemon) -> None:
    plain = Daemon(daemon.root, False, daemon.port, 0, 0)
    assert_refused(daemon, "plain_http", lambda: plain.get("/v1/models"))


def test_A30_bytes_of_no_protocol(daemon: Daemon) -> None:
    def talk() -> None:
        with socket.create_connection((HOST, daemon.port), timeout=30) as sock:
            sock.sendall(b"\0\1\2\3\4\5\6\7\r\n\r\n")
            if not sock.recv(100):
                raise ConnectionError

    assert_refused(daemon, "other", talk)


def test_A30_tls_below_1_3(daemon: Daemon) -> None:
    context = daemon.tls()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert_refused(daemon, "old_protocol", lambda: get_models(daemon, context))


def test_A30_no_certificate(daemon: Daemon) -> None:
    assert_refused(daemon, "no_certificate", lambda: get_models(daemon, context_of(daemon, None)))


@pytest.mark.parametrize("name", ["foreign", "expired"])
def test_A30_useless_certificates(daemon: Daemon, strangers: Path, name: str) -> None:
    context = context_of(daemon, strangers / f"{name}.pem")
    assert_refused(daemon, f"{name}_certificate", lambda: get_models(daemon, context))


def test_A30_a_client_that_trusts_another_ca(daemon: Daemon) -> None:
    assert_refused(daemon, "refused_by_client", lambda: get_models(daemon, ssl.create_default_context()))


def test_A30_a_flood_writes_few_lines(daemon: Daemon) -> None:
    before = failed(daemon, "other")
    for _ in range(50):
        with socket.create_connection((HOST, daemon.port), timeout=30) as sock:
            sock.sendall(b"\0\1\2\3\4\5\6\7\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                sock.recv(100)
    eventually(lambda: failed(daemon, "other") == before + 50, 10.0, "all are counted")
    lines = [line for line in daemon.stderr.splitlines() if "no TLS: the bytes are no TLS handsh" in line]
    assert 1 <= len(lines) < 10
    assert daemon.get("/v1/models").status == 200


def test_A10_half_opens_give_way_and_end(daemon: Daemon) -> None:
    before = failed(daemon, "timeout")
    with contextlib.ExitStack() as stack:
        socks = []
        for number in range(40):  # more than there is room for
            socks.append(stack.enter_context(socket.create_connection((HOST, daemon.port), timeout=30)))
            socks[-1].sendall(HALF_HELLO if number % 2 else b"")
        assert daemon.get("/v1/models").status == 200
        assert daemon.manage("/v2/health/ready").status == 200
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                assert sock.recv(100) == b""
    assert failed(daemon, "timeout") > before
    assert daemon.get("/v1/models").status == 200


@pytest.mark.slow
def test_F22_A30_a_client_revoked_while_serving_keeps_its_connection_only(
    daemon: Daemon, strangers: Path
) -> None:
    """And a broken certificate file, put there meanwhile, changes nothing but the log."""
    context = context_of(daemon, strangers / "revoked.pem")
    kept = http.client.HTTPSConnection(HOST, daemon.port, timeout=30, context=context)
    with contextlib.closing(kept):
        kept.request("GET", "/v1/models")
        assert kept.getresponse().read()
        security = daemon.root / "security"
        command = [sys.executable, SCRIPT, "--dir", security, "--revoke", strangers / "revoked.pem"]
        subprocess.run(command, check=True, capture_output=True)
        broken = security / "certs" / "management" / "server.pem"
        good = broken.read_bytes()
        broken.write_bytes(b"no certificate")

        eventually(lambda: "read again" in daemon.stderr, POLL_S, "the revocation list is read again")
        assert_refused(daemon, "revoked_certificate", lambda: get_models(daemon, context))
        kept.request("GET", "/v1/models")
        assert kept.getresponse().status == 200
    stays = "certificates stay as they were"
    eventually(lambda: stays in daemon.stderr, POLL_S, "the broken certificate is told")
    assert str(broken) in next(line for line in daemon.stderr.splitlines() if stays in line)
    assert daemon.manage("/v2/health/ready").status == 200
    broken.write_bytes(good)
