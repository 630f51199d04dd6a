"""Who gets through the handshake, and which material is refused before anything is served."""

from __future__ import annotations

import getpass
import importlib.util
import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from endpoint import tls
from endpoint.live_tls import LiveTls
from endpoint.tls import check_listeners, check_material, make_server_context
from engine.errors import EXIT_TLS, StartupError
from engine.settings import Listener, TlsFiles

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_certs.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_certs_for_tls", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_certs = _load_script()


class Material:
    """The business plane's set as make_certs lays it out."""

    def __init__(self, directory: Path, ca_key: rsa.RSAPrivateKey) -> None:
        self.directory = directory
        certificate = x509.load_pem_x509_certificate((directory / "ca/ca.pem").read_bytes())
        self.authority = make_certs.Authority(certificate, ca_key)
        self.files = TlsFiles(
            ca_files=(directory / "ca/ca.pem",),
            cert_file=directory / "certs/server.pem",
            key_file=directory / "keys/server.key.pem",
            key_password_file=None,
            crl_files=(directory / "certs/server_crl.pem",),
        )

    def put(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def issue_server(self, days: int = 825) -> TlsFiles:
        """The same set with a new server certificate."""
        certificate, key = self.authority.issue("test", days, ["127.0.0.1"])
        return replace(
            self.files,
            cert_file=self.put("other/server.pem", certificate),
            key_file=self.put("other/server.key.pem", key),
        )

    def encrypt_key(self, password: bytes) -> TlsFiles:
        key = load_pem_private_key(self.files.key_file.read_bytes(), None)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
        return replace(self.files, key_file=self.put("other/encrypted.key.pem", pem))

    def client(self, name: str | None = "client") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.directory / "client/ca.pem")
        if name is not None:
            context.load_cert_chain(
                self.directory / f"client/{name}.pem", self.directory / f"client/{name}.key.pem"
            )
        return context


@pytest.fixture(scope="module")
def keys() -> list[rsa.RSAPrivateKey]:
    return [rsa.generate_private_key(65537, make_certs.RSA_BITS) for _ in range(2)]


@pytest.fixture
def make_material(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[rsa.RSAPrivateKey]
) -> Callable[..., Material]:
    """Sets of certificates. One key serves a whole set, because making keys takes long."""

    def make(name: str, key: rsa.RSAPrivateKey = keys[0]) -> Material:
        monkeypatch.setattr(make_certs, "_new_key", lambda: key)
        assert make_certs.main(["--dir", str(tmp_path / name)]) == 0
        return Material(tmp_path / name, key)

    return make


@pytest.fixture
def material(make_material: Callable[..., Material]) -> Material:
    return make_material("security")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "127.0.0.1") -> ssl.SSLObject:
    """Both sides' handshakes in memory. Returns the server's side; raises what either side raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(20):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            return ends[1]
    raise AssertionError("the handshake does not end")


# --- handshakes ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_good_client_gets_in(material: Material, host: str) -> None:
    client = material.client()
    client.set_alpn_protocols(["h2", "http/1.1"])
    connection = handshake(make_server_context(material.files), client, host)
    assert connection.version() == "TLSv1.3"
    assert connection.selected_alpn_protocol() == "http/1.1"
    assert connection.getpeercert()


def test_client_without_certificate_is_refused(material: Material) -> None:
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(make_server_context(material.files), material.client(None))


def test_client_of_another_ca_is_refused(
    material: Material, make_material: Callable[..., Material], keys: list[rsa.RSAPrivateKey]
) -> None:
    foreign = make_material("foreign", keys[1]).client()
    foreign.load_verify_locations(material.directory / "client/ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(make_server_context(replace(material.files, crl_files=())), foreign)


def test_server_certificate_is_no_client_certificate(material: Material) -> None:
    client = material.client(None)
    client.load_cert_chain(material.files.cert_file, material.files.key_file)
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(make_server_context(material.files), client)


def test_tls_1_2_is_refused(material: Material) -> None:
    client = material.client()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        handshake(make_server_context(material.files), client)


def _revoke(material: Material, name: str) -> None:
    certificate = material.directory / f"client/{name}.pem"
    assert make_certs.main(["--dir", str(material.directory), "--revoke", str(certificate)]) == 0


def test_revoked_client_is_refused_and_the_others_are_not(material: Material) -> None:
    assert make_certs.main(["--dir", str(material.directory), "--issue-client", "bob"]) == 0
    _revoke(material, "bob")
    server = make_server_context(material.files)
    handshake(server, material.client())
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        handshake(server, material.client("bob"))
    handshake(make_server_context(replace(material.files, crl_files=())), material.client("bob"))


def test_no_session_tickets_where_revocation_is_checked(material: Material) -> None:
    assert make_server_context(material.files).num_tickets == 0
    assert make_server_context(replace(material.files, crl_files=())).num_tickets > 0


# --- key passwords ---


@pytest.mark.parametrize("text", [b"pass word", b"pass word\n", b"pass word\r\nsecond line\n"])
def test_encrypted_key_with_password_file(material: Material, text: bytes) -> None:
    files = replace(
        material.encrypt_key(b"pass word"), key_password_file=material.put("pass/key_pwd.txt", text)
    )
    assert check_material("business", files) == []
    handshake(make_server_context(files), material.client())


def test_wrong_password_is_not_repeated(material: Material) -> None:
    wrong = material.put("pass/key_pwd.txt", b"wrong-secret")
    files = replace(material.encrypt_key(b"right-secret"), key_password_file=wrong)
    for attempt in (lambda: check_material("business", files), lambda: make_server_context(files)):
        with pytest.raises(StartupError) as caught:
            attempt()
        assert caught.value.exit_code == EXIT_TLS
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"\n", b"\r\npass word\n"])
def test_an_empty_password_is_told(material: Material, text: bytes) -> None:
    password = material.put("pass/key_pwd.txt", text)
    files = replace(material.encrypt_key(b"pass word"), key_password_file=password)
    for attempt in (lambda: check_material("business", files), lambda: make_server_context(files)):
        with pytest.raises(StartupError, match=f"the first line of {password} is empty") as caught:
            attempt()
        assert caught.value.exit_code == EXIT_TLS


@pytest.mark.parametrize("answer", ["", EOFError])
def test_no_password_from_the_terminal_is_told(
    material: Material, monkeypatch: pytest.MonkeyPatch, answer: str | type[EOFError]
) -> None:
    def ask(prompt: str) -> str:
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr(getpass, "getpass", ask)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    tls._ask_password.cache_clear()
    with pytest.raises(StartupError, match="is encrypted and"):
        check_material("business", material.encrypt_key(b"typed"))
    tls._ask_password.cache_clear()


def test_encrypted_key_without_password_and_terminal(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    files = material.encrypt_key(b"x")
    with pytest.raises(StartupError, match="is encrypted and no password file is named"):
        check_material("business", files)
    with pytest.raises(StartupError, match="is encrypted"):
        make_server_context(files)


def test_password_is_asked_for_once(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "typed"

    monkeypatch.setattr(getpass, "getpass", ask)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    tls._ask_password.cache_clear()
    files = material.encrypt_key(b"typed")
    check_material("business", files)
    make_server_context(files)
    assert len(asked) == 1 and str(files.key_file) in asked[0]


# --- material ---


def _fatal(files: TlsFiles) -> str:
    with pytest.raises(StartupError) as caught:
        check_material("management", files)
    assert caught.value.exit_code == EXIT_TLS
    assert "PRIVATE" not in str(caught.value)
    return str(caught.value)


def test_good_material_has_no_remarks(material: Material) -> None:
    assert check_material("business", material.files) == []


def test_expired_certificate(material: Material) -> None:
    files = material.issue_server(days=0)
    assert f"ServerConfig.managementTlsCert={files.cert_file}: expired on" in _fatal(files)


def test_certificate_close_to_its_end_warns(material: Material) -> None:
    (warning,) = check_material("business", material.issue_server(days=29))
    assert "expires on" in warning
    assert check_material("business", material.issue_server(days=31)) == []


def test_short_rsa_key(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_certs, "_new_key", lambda: rsa.generate_private_key(65537, 2048))
    assert "RSA key of 2048 bits; use a certificate with at least 3072 bits" in _fatal(
        material.issue_server()
    )


def test_elliptic_curves(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_certs, "_new_key", lambda: ec.generate_private_key(ec.SECP256R1()))
    files = material.issue_server()
    (warning,) = check_material("business", files)
    assert "elliptic-curve" in warning
    handshake(make_server_context(files), material.client())
    monkeypatch.setattr(make_certs, "_new_key", lambda: ec.generate_private_key(ec.SECP224R1()))
    assert "too short" in _fatal(material.issue_server())


def test_key_of_another_certificate(
    material: Material, monkeypatch: pytest.MonkeyPatch, keys: list[rsa.RSAPrivateKey]
) -> None:
    monkeypatch.setattr(make_certs, "_new_key", lambda: keys[1])
    files = replace(material.files, key_file=material.issue_server().key_file)
    assert f"managementTlsPk={files.key_file}: does not belong to {files.cert_file}" in _fatal(files)
    with pytest.raises(StartupError):
        make_server_context(files)


def test_expired_list_warns(material: Material) -> None:
    material.put("certs/server_crl.pem", material.authority.revocation_list((), 5, 0))
    (warning,) = check_material("business", material.files)
    assert "ServerConfig.tlsCrlFiles" in warning and "expired" in warning


def test_list_of_another_ca_warns(material: Material) -> None:
    name, key = make_certs._name("Another CA"), material.authority.key
    certificate = make_certs._builder(name, name, key, 10).sign(key, make_certs.hashes.SHA256())
    crl = make_certs.Authority(certificate, key).revocation_list((), 1, 10)
    files = replace(material.files, crl_files=(material.put("other/crl.pem", crl),))
    (warning,) = check_material("business", files)
    assert "no CRL of CN=MindIE demonstration CA" in warning


@pytest.mark.parametrize("slot", ["cert_file", "key_file", "ca_files", "crl_files"])
@pytest.mark.parametrize("content", [b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", None])
def test_unreadable_file_is_named(material: Material, slot: str, content: bytes | None) -> None:
    path = material.directory / "broken.pem"
    if content is not None:
        path.write_bytes(content)
    changed: object = (path,) if slot.endswith("files") else path
    files = replace(material.files, **{slot: changed})  # type: ignore[arg-type]
    assert str(path) in _fatal(files)
    with pytest.raises(StartupError) as caught:
        make_server_context(files)
    assert caught.value.exit_code == EXIT_TLS


def test_all_planes_are_judged_in_one_go(material: Material) -> None:
    expired = material.issue_server(days=0)
    missing = replace(material.files, cert_file=material.directory / "nowhere.pem")
    with pytest.raises(StartupError) as caught:
        check_listeners(
            (
                Listener(("business",), "127.0.0.1", 1, expired),
                Listener(("management", "metrics"), "127.0.0.2", 2, missing),
            )
        )
    first, second = str(caught.value).splitlines()
    assert first.startswith("[tls] ServerConfig.tlsCert=") and "expired" in first
    assert second.startswith("[tls] ServerConfig.managementTlsCert=") and "nowhere.pem" in second
    assert check_listeners((Listener(("business",), "127.0.0.1", 1, None),)) == []


# --- files that change while they are in use ---

_HOUR_S = 3600.0


class _Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1e6

    def __call__(self) -> float:
        return self.seconds


def test_F22_a_changed_list_counts_from_the_next_handshake(material: Material) -> None:
    live, client = LiveTls("business", material.files), material.client()
    before = live.material.context
    live.poll()
    assert live.material.context is before
    _revoke(material, "client")
    live.poll()
    handshake(before, client)  # one that has begun goes on with what it began with
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        handshake(live.material.context, client)


def test_F22_a_new_certificate_comes_with_its_key(
    material: Material, caplog: pytest.LogCaptureFixture
) -> None:
    """In two steps, as by hand: in between the files do not fit, and the old pair stays."""
    live = LiveTls("business", material.files)
    before = live.material
    key = rsa.generate_private_key(65537, make_certs.RSA_BITS)
    builder = make_certs._builder(
        make_certs._name("new"), material.authority.certificate.subject, key, 40
    ).add_extension(x509.SubjectAlternativeName([x509.DNSName("New.example")]), critical=False)
    certificate = builder.sign(material.authority.key, make_certs.hashes.SHA256())
    material.put("certs/server.pem", certificate.public_bytes(Encoding.PEM))
    for _ in range(3):
        live.poll()
    assert live.material is before
    assert caplog.text.count("certificates stay as they were") == 1
    material.put("keys/server.key.pem", make_certs._key_pem(key))
    live.poll()
    assert live.material.names == {"new.example"}
    assert live.material.expiry == certificate.not_valid_after_utc.timestamp()
    handshake(live.material.context, material.client(), "new.example")


@pytest.mark.parametrize("slot", ["cert_file", "key_file", "ca_files", "crl_files"])
def test_F22_a_file_that_is_gone_or_broken_changes_nothing(
    material: Material, caplog: pytest.LogCaptureFixture, slot: str
) -> None:
    live = LiveTls("business", material.files)
    value = getattr(material.files, slot)
    path = value[0] if isinstance(value, tuple) else value
    good, before = path.read_bytes(), live.material
    for content in (b"broken", None):
        caplog.clear()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        live.poll()
        live.poll()
        assert caplog.text.count(str(path)) == 1
        with pytest.raises(StartupError):
            live.read()
        assert live.material is before
    path.write_bytes(good)
    live.poll()
    assert live.material is not before
    handshake(live.material.context, material.client())


def test_F22_what_will_expire_is_told_once_a_day(
    material: Material, caplog: pytest.LogCaptureFixture
) -> None:
    clock = _Clock()
    live = LiveTls("business", material.issue_server(days=29), clock)
    told = []
    for _ in range(9):  # the start has been told by the parent
        clock.seconds += 6 * _HOUR_S
        live.poll()
        told.append(caplog.text.count("expires on"))
    assert told == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_F22_an_endpoint_that_takes_over_serves_an_expired_certificate(material: Material) -> None:
    """It was good when the service started; clients decide."""
    files = material.issue_server(days=0)
    live = LiveTls("business", files)
    assert live.material.expiry
    with pytest.raises(StartupError, match="expired"):
        live.read()


def test_a_child_asks_nobody_for_a_password(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getpass", lambda prompt: pytest.fail("asked"))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(tls, "_PARENT", 1)
    tls._ask_password.cache_clear()
    with pytest.raises(StartupError, match="is encrypted and"):
        check_material("business", material.encrypt_key(b"typed"))
    tls._ask_password.cache_clear()
