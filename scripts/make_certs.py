"""Make demonstration certificates at the paths that the stock config.json names.

    python scripts/make_certs.py [--dir mindie-service/security] [--days 825] [--host NAME ...] [--force]
    python scripts/make_certs.py [--dir ...] --issue-client NAME
    python scripts/make_certs.py [--dir ...] --revoke client/client.pem

One demonstration CA signs everything, and each plane's CA file and CRL are copies of that CA's. That keeps
the revocation check of the whole chain simple (one issuer, one list) and lets one client certificate in on
the business, the management and the metrics plane alike. For real separation give each plane its own CA.

The CA's key stays in ca/ca.key.pem, so that more clients can be issued; move it away on a real host.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

RSA_BITS = 3072  # the least the server accepts
HOSTS = ("127.0.0.1", "127.0.0.2", "::1", "localhost")
CLOCK_SKEW = timedelta(hours=1)

CA_KEY = "ca/ca.key.pem"
CA_FILES = ("ca/ca.pem", "ca/management_ca.pem", "ca/metrics_ca.pem", "client/ca.pem")
CRL_FILES = ("certs/server_crl.pem", "management/certs/server_crl.pem", "metrics/certs/server_crl.pem")
SERVERS = {  # plane: certificate, key
    "business": ("certs/server.pem", "keys/server.key.pem"),
    "management": ("certs/management/server.pem", "keys/management/server.key.pem"),
    "metrics": ("certs/metrics/server.pem", "keys/metrics/server.key.pem"),
}


class Refused(Exception):
    """Nothing was written. The text says why."""


class Authority:
    """The demonstration CA: its certificate and the key that signs."""

    def __init__(self, certificate: x509.Certificate, key: rsa.RSAPrivateKey) -> None:
        self.certificate = certificate
        self.key = key

    @classmethod
    def create(cls, days: int) -> Authority:
        key = _new_key()
        name = _name("MindIE demonstration CA")
        usage = _key_usage(signs_certificates=True)
        builder = _builder(name, name, key, days).add_extension(x509.BasicConstraints(True, 0), critical=True)
        builder = builder.add_extension(usage, critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        try:
            certificate = x509.load_pem_x509_certificate((directory / CA_FILES[0]).read_bytes())
            key = load_pem_private_key((directory / CA_KEY).read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise Refused(f"the CA in {directory / 'ca'} cannot be used: {error}") from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise Refused(f"{directory / CA_KEY} is no RSA key")
        return cls(certificate, key)

    def issue(self, common_name: str, days: int, hosts: Sequence[str] = ()) -> tuple[bytes, bytes]:
        """PEM of certificate and key: for a server when there are hosts, else for a client."""
        key = _new_key()
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = _builder(_name(common_name), self.certificate.subject, key, days)
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        builder = builder.add_extension(issuer_id, critical=False)
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return certificate.public_bytes(Encoding.PEM), _key_pem(key)

    def revocation_list(self, revoked: Sequence[x509.RevokedCertificate], number: int, days: int) -> bytes:
        now = datetime.now(timezone.utc)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        # verifiers take the newest of several lists, so two made in one second must differ
        builder = builder.last_update(now - CLOCK_SKEW + timedelta(seconds=number))
        builder = builder.next_update(now + timedelta(days=days))
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
        builder = builder.add_extension(issuer_id, critical=False)
        for entry in revoked:
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def make_all(days: int, hosts: Sequence[str]) -> dict[str, bytes]:
    """Every file of a fresh set, by its path below the security directory."""
    authority = Authority.create(days)
    files = dict.fromkeys(CA_FILES, authority.certificate.public_bytes(Encoding.PEM))
    files[CA_KEY] = _key_pem(authority.key)
    files |= dict.fromkeys(CRL_FILES, authority.revocation_list((), 1, days))
    for plane, (certificate_file, key_file) in SERVERS.items():
        files[certificate_file], files[key_file] = authority.issue(f"MindIE {plane} plane", days, hosts)
    files |= make_client(authority, "client", days)
    return files


def make_client(authority: Authority, name: str, days: int) -> dict[str, bytes]:
    if not name.isprintable() or Path(name).name != name or not 1 <= len(name) <= 64:
        raise Refused(f"{name!r} cannot be a client's name")
    certificate, key = authority.issue(name, days)
    return {f"client/{name}.pem": certificate, f"client/{name}.key.pem": key}


def revoke(directory: Path, certificate_file: Path, days: int) -> dict[str, bytes]:
    """New revocation lists that also name the given certificate."""
    authority = Authority.load(directory)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        last = x509.load_pem_x509_crl((directory / CRL_FILES[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    if certificate.issuer != authority.certificate.subject:
        raise Refused(f"{certificate_file} was not issued by the CA in {directory / 'ca'}")
    number = last.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
    entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
    entry = entry.revocation_date(datetime.now(timezone.utc) - CLOCK_SKEW)
    return dict.fromkeys(CRL_FILES, authority.revocation_list([*last, entry.build()], number, days))


def write_files(directory: Path, files: dict[str, bytes], replace: bool) -> None:
    """Write all, files 0600 in directories 0700. Raises Refused before any write when one is in the way."""
    in_the_way = [name for name in files if os.path.lexists(directory / name)]
    if in_the_way and not replace:
        raise Refused(f"exists already in {directory}: {', '.join(in_the_way)}; --force replaces them")
    for name, content in files.items():
        path = directory / name
        for parent in [*reversed(path.parents)][len(directory.parents) :]:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(fresh, path)


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)


def _key_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make demonstration certificates for config.json's stock paths."
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("mindie-service/security"), help="the security directory"
    )
    parser.add_argument("--days", type=int, default=825, help="validity (default: 825)")
    parser.add_argument(
        "--host", action="append", default=[], help="further IP address or name of the servers"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--issue-client", metavar="NAME", help="make another client certificate with the present CA"
    )
    action.add_argument(
        "--revoke", metavar="PEM", type=Path, help="add a certificate to the revocation lists"
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.days <= 36500:
        parser.error("--days must be 1 to 36500")
    replace = options.force
    try:
        if options.revoke:
            files, replace = revoke(options.dir, options.revoke, options.days), True
        elif options.issue_client:
            files = make_client(Authority.load(options.dir), options.issue_client, options.days)
        else:
            files = make_all(options.days, [*HOSTS, *options.host])
        write_files(options.dir, files, replace)
    except (Refused, OSError, ValueError) as error:
        print(f"make_certs: {error}", file=sys.stderr)
        return 1
    for name in files:
        print(options.dir / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
