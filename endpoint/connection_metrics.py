"""Connections and handshakes in the exposition."""

from __future__ import annotations

from collections.abc import Sized
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

Closed = Literal["refused", "no_descriptor", "evicted", "slow_head", "slow_body", "stalled"]
Failure = Literal[
    "plain_http",
    "old_protocol",
    "no_certificate",
    "foreign_certificate",
    "expired_certificate",
    "revoked_certificate",
    "no_usable_crl",
    "refused_by_client",
    "timeout",
    "gave_up",
    "other",
]


class ConnectionMetrics:
    """Of every listener; `plane` names its planes, joined by +."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model = model_name
        self._open = Gauge(
            "connections_open", "connections open now", ["model_name", "plane"], registry=registry
        )
        self._limit = Gauge(
            "connections_limit", "connections allowed at once", ["model_name", "plane"], registry=registry
        )
        self._closed = Counter(
            "connections_closed",
            "connections ended by the server for a limit's sake",
            ["model_name", "plane", "cause"],
            registry=registry,
        )
        self._failed = Counter(
            "tls_handshakes_failed", "TLS handshakes that failed", ["model_name", "plane", "cause"],
            registry=registry,
        )  # fmt: skip

    def watch(self, plane: str, limit: int, connections: Sized) -> None:
        """`connections`: counted whenever somebody asks."""
        self._limit.labels(self._model, plane).set(limit)
        self._open.labels(self._model, plane).set_function(lambda: len(connections))

    def closed(self, plane: str, cause: Closed) -> None:
        self._closed.labels(self._model, plane, cause).inc()

    def handshake_failed(self, plane: str, cause: Failure) -> None:
        self._failed.labels(self._model, plane, cause).inc()
