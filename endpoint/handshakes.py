"""Why a TLS handshake failed: a closed set of causes for the counters, and what an operator is told."""

from __future__ import annotations

import ssl

from endpoint.connection_metrics import Failure

_REASONS: dict[str, Failure] = {
    "HTTP_REQUEST": "plain_http",
    "UNSUPPORTED_PROTOCOL": "old_protocol",
    "VERSION_TOO_LOW": "old_protocol",
    "NO_PROTOCOLS_AVAILABLE": "old_protocol",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
}

# of OpenSSL's x509_vfy.h; every other code is a certificate that no CA here vouches for
_VERIFY_CODES: dict[int, Failure] = {
    3: "no_usable_crl",  # none of its issuer
    9: "expired_certificate",  # not valid yet
    10: "expired_certificate",
    11: "no_usable_crl",  # not valid yet
    12: "no_usable_crl",  # expired
    23: "revoked_certificate",
}

MEANING: dict[Failure, str] = {
    "plain_http": "plain HTTP was sent; clients must use https://",
    "old_protocol": "the client offers no TLS 1.3",
    "no_certificate": "the client presented no certificate",
    "foreign_certificate": "the client's certificate is not one of a CA in ...CaFile",
    "expired_certificate": "the client's certificate has expired, or is not valid yet",
    "revoked_certificate": "the client's certificate is revoked",
    "no_usable_crl": "no valid revocation list of the client's CA; renew the files of ...CrlFiles",
    "refused_by_client": "the client does not trust this server's certificate",
    "timeout": "not done within handshakeTimeoutSec",
    "gave_up": "the client closed the connection",
    "other": "the bytes are no TLS handshake that this server takes",
}


def failure(error: OSError) -> Failure:
    """`error`: what the handshake raised."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_CODES.get(error.verify_code, "foreign_certificate")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        return "refused_by_client" if "_ALERT_" in reason else _REASONS.get(reason, "other")
    # ConnectionAbortedError is asyncio's own, for its handshake timeout
    return "timeout" if isinstance(error, ConnectionAbortedError | TimeoutError) else "gave_up"
