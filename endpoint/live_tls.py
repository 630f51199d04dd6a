"""A listener's TLS context that follows its files: handshakes get the newest, connections keep theirs."""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from endpoint.tls import certificate_names, check_material, expiry, make_server_context
from engine.errors import StartupError
from engine.settings import Plane, TlsFiles

log = logging.getLogger("server.tls")

_REMIND_S = 24 * 3600.0
_LOOK_S = 3600.0  # a list or certificate may come to its end between two reminders

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Material:
    """What the files of one plane held when they were read."""

    stamp: _Stamp
    context: ssl.SSLContext
    names: frozenset[str]  # of the server's certificate: DNS names and addresses, in lower case
    expiry: float  # of the server's certificate, Unix time
    warnings: tuple[str, ...]


class LiveTls:
    """The material of one plane. `read` and `poll` read files: not on the event loop."""

    def __init__(self, plane: Plane, files: TlsFiles, now: Callable[[], float] = time.monotonic) -> None:
        """Raises StartupError (EXIT_TLS) when a file is unusable. `now`: seconds, monotonic."""
        self._plane = plane
        self._files = files
        self._now = now
        # Not checked here: an endpoint that takes over from a dead one serves even if something has expired.
        self.material = self._load(_stamp(files), [])
        self._seen = self.material.stamp
        self._looked = now()
        # by warning, when it was last told; the parent has told those of the start
        self._reminded = dict.fromkeys(self._remarks(), now())

    def days_left(self) -> float:
        """Until the server's certificate expires; negative when it has."""
        return (self.material.expiry - time.time()) / 86_400

    def read(self) -> Material:
        """All files as they are now, for `take`. Raises StartupError (EXIT_TLS) when one is unusable."""
        stamp = _stamp(self._files)  # before reading: what changes meanwhile is seen by the next poll
        return self._load(stamp, check_material(self._plane, self._files))

    def take(self, material: Material) -> None:
        """Use it from the next handshake on."""
        self.material = material
        self._seen = material.stamp
        log.info("%s plane: %s and its revocation lists read again", self._plane, self._files.cert_file)

    def poll(self) -> None:
        """Reload when a file has changed, and remind of what expires, once a day."""
        stamp = _stamp(self._files)
        if stamp != self._seen:
            self._seen = stamp  # one line for each change, also for a bad one
            try:
                self.take(self.read())
            except StartupError as error:
                log.warning("%s plane: certificates stay as they were: %s", self._plane, error)
            else:
                self._tell(self.material.warnings)
        elif self._now() - self._looked > _LOOK_S:
            self._looked = self._now()
            self._tell(self._remarks())

    def _load(self, stamp: _Stamp, warnings: list[str]) -> Material:
        certificate = self._files.cert_file
        return Material(
            stamp,
            make_server_context(self._files),
            certificate_names(certificate),
            expiry(certificate),
            tuple(warnings),
        )

    def _remarks(self) -> list[str]:
        """What is wrong with the files, or will be soon."""
        try:
            return check_material(self._plane, self._files)
        except StartupError as error:  # such as the certificate itself, which has expired by now
            return str(error).splitlines()

    def _tell(self, warnings: Sequence[str]) -> None:
        now = self._now()
        for warning in warnings:
            if now - self._reminded.get(warning, now - _REMIND_S) >= _REMIND_S:
                self._reminded[warning] = now
                log.warning("%s", warning)


def _stamp(files: TlsFiles) -> _Stamp:
    paths = [*files.ca_files, files.cert_file, files.key_file, *files.crl_files]
    if files.key_password_file is not None:
        paths.append(files.key_password_file)
    return tuple(map(_stamp_of, paths))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
