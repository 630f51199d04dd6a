"""Mutual TLS: the clients that are let in on every plane, and those that must be refused."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import subprocess
import sys

import pytest

from tests.harness import HOST, REPO, Daemon


def handshake(server: Daemon, context: ssl.SSLContext, port: int | None = None) -> None:
    """Connect and wait for the server's verdict: under TLS 1.3 it comes after the client is done."""
    connection = http.client.HTTPSConnection(HOST, port or server.port, timeout=30, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        connection.getresponse().read()


@pytest.mark.parametrize("plane", ["port", "management_port", "metrics_port"])
def test_every_plane_takes_the_demo_client_and_nobody_else(https_server: Daemon, plane: str) -> None:
    port = getattr(https_server, plane)
    handshake(https_server, https_server.tls(), port)
    stranger = ssl.create_default_context(cafile=str(https_server.client_dir / "ca.pem"))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(https_server, stranger, port)


def test_tls_1_2_is_refused(https_server: Daemon) -> None:
    context = https_server.tls()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(https_server, context)


def test_a_client_of_another_authority_is_refused(
    https_server: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "security"
    script = REPO / "scripts" / "make_certs.py"
    subprocess.run([sys.executable, script, "--dir", other], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(https_server.client_dir / "ca.pem"))
    context.load_cert_chain(other / "client" / "client.pem", other / "client" / "client.key.pem")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(https_server, context)


def test_plain_http_to_the_tls_port_harms_nobody(https_server: Daemon) -> None:
    plain = Daemon(https_server.root, False, https_server.port, 0, 0)
    with pytest.raises((ConnectionError, http.client.BadStatusLine)):
        plain.get("/v1/models")
    assert https_server.get("/v1/models").status == 200
