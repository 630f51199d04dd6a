"""Certificates: what makes them unusable, and the context that demands one from every client.

`check_material` is for the parent before its first fork, `make_server_context` for the process that serves.
Neither ever writes key material or passwords into a message.
"""

from __future__ import annotations

import functools
import getpass
import os
import ssl
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from engine.errors import EXIT_TLS, StartupError
from engine.settings import Listener, Plane, TlsFiles

MIN_RSA_BITS = 3072
MIN_EC_BITS = 256
EXPIRY_WARNING = timedelta(days=30)

# What the keys of a plane's certificate set begin with.
KEY_PREFIX: dict[Plane, str] = {"business": "tls", "management": "managementTls", "metrics": "metricsTls"}

_PARENT = os.getpid()  # of the process that imports this first: the parent

_Loaded = TypeVar("_Loaded")


def check_listeners(listeners: tuple[Listener, ...]) -> list[str]:
    """Check every listener's material. Returns all warnings; raises StartupError with all fatal findings."""
    warnings: list[str] = []
    fatal: list[str] = []
    for listener in listeners:
        if listener.tls is None:
            continue
        try:
            warnings += check_material(listener.planes[0], listener.tls)
        except StartupError as error:
            fatal.append(str(error))
    if fatal:
        raise StartupError("\n".join(fatal), EXIT_TLS)
    return warnings


def check_material(plane: Plane, files: TlsFiles) -> list[str]:
    """Warnings about one plane's files. Raises StartupError (EXIT_TLS), a line for each fatal finding.

    An encrypted key without a password file is asked for on the terminal, once, when there is one.
    """
    look = _Inspection(plane)
    certificate = look.certificate(files.cert_file)
    key = look.key(files)
    if certificate is not None and key is not None and _public_bytes(certificate) != _public_bytes(key):
        look.fatal(
            "Pk",
            files.key_file,
            f"does not belong to {files.cert_file}",
            "install the key of that certificate",
        )
    authorities = [authority for path in files.ca_files for authority in look.authorities(path)]
    look.revocation_lists(files.crl_files, authorities)
    if look.fatal_lines:
        raise StartupError("\n".join(look.fatal_lines), EXIT_TLS)
    if not authorities:
        raise StartupError(f"[tls] no CA certificate for the {plane} plane", EXIT_TLS)
    return look.warnings


def make_server_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.3 only, client certificate required. Raises StartupError (EXIT_TLS) when a file is unusable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A password callback, even for plain keys: without one OpenSSL would prompt by itself.
        context.load_cert_chain(files.cert_file, files.key_file, lambda: _password(files))
        for ca_file in files.ca_files:
            context.load_verify_locations(ca_file)
        if files.crl_files:
            for crl_file in files.crl_files:
                context.load_verify_locations(crl_file)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
            # A resumed session is not verified again, so a ticket would outlive its client's revocation.
            context.num_tickets = 0
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise StartupError(
            f"[tls] {files.cert_file}, {files.key_file}: {_reason(error)}", EXIT_TLS
        ) from error
    return context


def certificate_names(path: Path) -> frozenset[str]:
    """DNS names and addresses the certificate speaks for, in lower case. Raises StartupError (EXIT_TLS)."""
    try:
        names = _read_leaf(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise StartupError(f"[tls] {path}: its names cannot be read: {_reason(error)}", EXIT_TLS) from error
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return frozenset([*map(str.lower, names.get_values_for_type(x509.DNSName)), *addresses])


def expiry(path: Path) -> float:
    """When the certificate ends, in Unix time. Raises StartupError (EXIT_TLS)."""
    return _read_leaf(path).not_valid_after_utc.timestamp()


def _read_leaf(path: Path) -> x509.Certificate:
    try:
        return _leaf(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise StartupError(f"[tls] {path}: cannot be read: {_reason(error)}", EXIT_TLS) from error


class _Inspection:
    """Collects what is wrong with one plane's files, named by their configuration keys."""

    def __init__(self, plane: Plane) -> None:
        self._prefix = f"ServerConfig.{KEY_PREFIX[plane]}"
        self._now = datetime.now(timezone.utc)
        self.warnings: list[str] = []
        self.fatal_lines: list[str] = []

    def fatal(self, key: str, path: Path, cause: str, fix: str) -> None:
        self.fatal_lines.append(f"[tls] {self._prefix}{key}={path}: {cause}; {fix}")

    def warn(self, key: str, path: Path, text: str) -> None:
        self.warnings.append(f"{self._prefix}{key}={path}: {text}")

    def certificate(self, path: Path) -> x509.Certificate | None:
        certificate = self._load("Cert", path, _leaf, "give a PEM certificate with an RSA or EC key")
        if certificate is None:
            return None
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if self._now < begins:
            self.fatal(
                "Cert", path, f"not valid before {begins:%Y-%m-%d %H:%M} UTC", "check the clock, or renew it"
            )
        elif self._now > ends:
            self.fatal("Cert", path, f"expired on {ends:%Y-%m-%d %H:%M} UTC", "renew the certificate")
        elif ends - self._now < EXPIRY_WARNING:
            self.warn("Cert", path, f"expires on {ends:%Y-%m-%d %H:%M} UTC")
        self._check_strength(path, certificate)
        return certificate

    def _check_strength(self, path: Path, certificate: x509.Certificate) -> None:
        public = certificate.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            if public.key_size < MIN_RSA_BITS:
                cause = f"RSA key of {public.key_size} bits"
                self.fatal("Cert", path, cause, f"use a certificate with at least {MIN_RSA_BITS} bits")
        elif isinstance(public, ec.EllipticCurvePublicKey) and public.key_size >= MIN_EC_BITS:
            self.warn(
                "Cert",
                path,
                f"elliptic-curve key ({public.curve.name}); RSA of {MIN_RSA_BITS} bits is expected",
            )
        else:
            fix = f"use RSA with at least {MIN_RSA_BITS} bits, or an elliptic curve with {MIN_EC_BITS}"
            self.fatal("Cert", path, "unsupported or too short public key", fix)

    def key(self, files: TlsFiles) -> PrivateKeyTypes | None:
        try:
            return load_private_key(files)
        except StartupError as error:
            self.fatal_lines.append(f"[tls] {self._prefix}Pk={error}")
        return None

    def authorities(self, path: Path) -> list[x509.Certificate]:
        found = self._load("CaFile", path, x509.load_pem_x509_certificates, "give PEM CA certificates") or []
        for authority in found:
            if self._now > authority.not_valid_after_utc:
                name = authority.subject.rfc4514_string()
                self.warn("CaFile", path, f"{name} has expired; its clients will be rejected")
        return found

    def revocation_lists(self, paths: tuple[Path, ...], authorities: list[x509.Certificate]) -> None:
        if not paths:
            return
        issuers = set()
        for path in paths:
            crl = self._load("CrlFiles", path, x509.load_pem_x509_crl, "give a PEM CRL, or set the key to []")
            if crl is None:
                continue
            issuers.add(crl.issuer)
            next_update = crl.next_update_utc
            if next_update is not None and self._now > next_update:
                self.warn("CrlFiles", path, f"expired on {next_update:%Y-%m-%d}; clients will be rejected")
        for authority in authorities:
            if authority.subject not in issuers and not self.fatal_lines:
                name = authority.subject.rfc4514_string()
                self.warn("CrlFiles", paths[0], f"no CRL of {name}; its clients will be rejected")

    def _load(self, key: str, path: Path, parse: Callable[[bytes], _Loaded], fix: str) -> _Loaded | None:
        try:
            return parse(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            self.fatal(key, path, f"cannot be read: {_reason(error)}", fix)
            return None


def load_private_key(files: TlsFiles) -> PrivateKeyTypes:
    """Decrypts when needed. Raises StartupError (EXIT_TLS): unreadable, wrong password, or no way to ask."""
    path = files.key_file
    try:
        pem = path.read_bytes()
        try:
            return load_pem_private_key(pem, None)
        except TypeError:  # how the library says "encrypted"
            return load_pem_private_key(pem, _password(files))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        if files.key_password_file is not None:
            cause = f"cannot be used with the password in {files.key_password_file}: {_reason(error)}"
        else:
            cause = f"cannot be used: {_reason(error)}"
        raise StartupError(f"{path}: {cause}; give the matching PEM key and password", EXIT_TLS) from error


def _password(files: TlsFiles) -> bytes:
    """Never empty: to the libraries that would mean that no password was given."""
    if files.key_password_file is not None:
        lines = files.key_password_file.read_bytes().splitlines()
        password, source = lines[0] if lines else b"", str(files.key_password_file)
    elif sys.stdin is not None and sys.stdin.isatty():
        password, source = _ask_password(files.key_file), "the answer on the terminal"
    else:
        cause = "is encrypted and no password file is named"
        raise StartupError(f"{files.key_file}: {cause}; set the ...PkPwd key", EXIT_TLS)
    if not password:
        cause = f"is encrypted and the first line of {source} is empty"
        raise StartupError(f"{files.key_file}: {cause}; give the password of the key", EXIT_TLS)
    return password


@functools.cache
def _ask_password(key_file: Path) -> bytes:
    """Asked in the parent before it forks; the children inherit the answer with the cache.

    A child that finds a newly encrypted key has nobody to ask.
    """
    if os.getpid() != _PARENT:
        return b""
    try:
        return getpass.getpass(f"Password of {key_file}: ").encode()
    except EOFError:
        return b""


def _leaf(pem: bytes) -> x509.Certificate:
    """The first certificate of a chain. Its key is read so that an unknown kind is a fault of the file."""
    certificate = x509.load_pem_x509_certificates(pem)[0]
    certificate.public_key()
    return certificate


def _public_bytes(holder: x509.Certificate | PrivateKeyTypes) -> bytes:
    return holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _reason(error: Exception) -> str:
    """The first line of a library's message; such messages name formats and positions, never contents."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0]
