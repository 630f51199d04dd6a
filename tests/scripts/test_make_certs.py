"""scripts/make_certs.py: the files of the stock paths, and that they work."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from daemon.config import load_settings
from endpoint.tls import check_listeners
from tests.daemon.config_home import TLS_FILES, Home, load_make_certs

make_certs = load_make_certs()


@pytest.fixture(scope="module")
def security(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("root") / "security"
    umask = os.umask(0)
    try:
        assert make_certs.main(["--dir", str(directory), "--host", "10.1.2.3", "--host", "llm.example"]) == 0
    finally:
        os.umask(umask)
    return directory


@pytest.fixture(scope="module")
def keys() -> list[rsa.RSAPrivateKey]:
    """One key for every certificate of the tests that do not look at keys; making one takes long."""
    return [rsa.generate_private_key(65537, make_certs.RSA_BITS)]


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_every_stock_path_and_the_clients_files_exist(security: Path) -> None:
    made = {str(path.relative_to(security.parent)) for path in security.rglob("*") if path.is_file()}
    clients = {f"security/client/{name}" for name in ("ca.pem", "client.pem", "client.key.pem")}
    assert made == {*TLS_FILES, *clients, "security/ca/ca.key.pem"}


def test_nobody_else_can_read_any_of_it(security: Path) -> None:
    for path in [security, *security.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_shipped_configuration_accepts_the_files(security: Path) -> None:
    home = Home(security.parent)
    home.put("conf/config.json", json.dumps(home.document))
    settings = load_settings(None, {}, home.root / "bin" / "mindieservice_daemon")
    assert check_listeners(settings.endpoint.listeners) == []
    assert not [warning for warning in settings.warnings if "chmod" in warning]


@pytest.mark.parametrize("plane", ["", "management/", "metrics/"])
def test_server_certificates_name_all_addresses(security: Path, plane: str) -> None:
    certificate = _certificate(security / f"certs/{plane}server.pem")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "127.0.0.2", "::1", "10.1.2.3"}
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "llm.example"}
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey) and key.key_size >= 3072


def test_planes_have_keys_of_their_own(security: Path) -> None:
    contents = [path.read_bytes() for path in security.rglob("*.key.pem")]
    assert len(set(contents)) == len(contents) == 5


def test_existing_files_are_kept_unless_forced(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    keys: list[rsa.RSAPrivateKey],
) -> None:
    monkeypatch.setattr(make_certs, "_new_key", lambda: keys[0])
    kept = tmp_path / "keys" / "server.key.pem"
    kept.parent.mkdir()
    kept.write_text("mine", encoding="utf-8")
    assert make_certs.main(["--dir", str(tmp_path)]) == 1
    assert "keys/server.key.pem" in capsys.readouterr().err
    assert kept.read_text(encoding="utf-8") == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert make_certs.main(["--dir", str(tmp_path), "--force"]) == 0
    assert str(kept) in capsys.readouterr().out
    assert b"PRIVATE KEY" in kept.read_bytes()


def test_further_clients_and_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[rsa.RSAPrivateKey]
) -> None:
    monkeypatch.setattr(make_certs, "_new_key", lambda: keys[0])
    assert make_certs.main(["--dir", str(tmp_path)]) == 0
    assert make_certs.main(["--dir", str(tmp_path), "--issue-client", "bob"]) == 0
    assert make_certs.main(["--dir", str(tmp_path), "--issue-client", "bob"]) == 1
    for name in ("bob", "client"):
        assert (
            make_certs.main(["--dir", str(tmp_path), "--revoke", str(tmp_path / f"client/{name}.pem")]) == 0
        )
    serials = {_certificate(tmp_path / f"client/{name}.pem").serial_number for name in ("bob", "client")}
    for file in make_certs.CRL_FILES:
        crl = x509.load_pem_x509_crl((tmp_path / file).read_bytes())
        assert {entry.serial_number for entry in crl} == serials
        assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "a\nb", "x" * 65])
def test_client_names_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    authority = make_certs.Authority.__new__(make_certs.Authority)
    with pytest.raises(make_certs.Refused):
        make_certs.make_client(authority, name, 1)


def test_without_a_ca_nothing_is_issued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_certs.main(["--dir", str(tmp_path), "--issue-client", "bob"]) == 1
    assert "cannot be used" in capsys.readouterr().err
