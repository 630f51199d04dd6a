"""Changes of config.json while the service runs: seen every five seconds, or at once on SIGHUP.

The supervisor's loop calls `poll`; there is no thread. A file with a finding changes nothing at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import datetime

from daemon.config import LoadedConfig, effective_timeouts, file_stamp
from daemon.config_report import ConfigError, counted, shown
from daemon.config_schema import RUNTIME, SERVER
from daemon.dynamic_level import DynamicLevel
from daemon.log_writeback import write_log_settings
from endpoint.tls import check_listeners
from engine.errors import StartupError
from engine.settings import LogSettings
from engine.wire.messages import Reconfigure

log = logging.getLogger("server.reload")

POLL_S = 5.0
_API_KEYS = f"{RUNTIME}.apiKeys"
_WAITING_TOKENS = f"{RUNTIME}.maxWaitingTokens"

# Keys that take effect while the service runs. All others need a restart.
HOT_KEYS = frozenset(
    {
        "EnableDynamicAdjustTimeoutConfig",
        f"{SERVER}.openAiSupport",
        f"{SERVER}.maxLinkNum",
        _WAITING_TOKENS,
        _API_KEYS,
    }
)


class ConfigWatcher:
    """Compares the file with what is in force, and says what the endpoint has to change."""

    def __init__(
        self,
        loaded: LoadedConfig,
        load: Callable[[LogSettings], LoadedConfig],
        set_levels: Callable[[str], None],
    ) -> None:
        """`loaded`: what the service was started with. `load` reads the same file again; it is given the log
        settings to keep where the file's are wrong. `set_levels`: of all processes; "" = the environment's.
        """
        self._settings = loaded.settings
        self._values = loaded.values.copy()  # in force: those of the start, and the hot ones since
        self._api_keys = loaded.settings.endpoint.api_keys
        self._stamp = loaded.stamp
        self._load = load
        self._set_levels = set_levels
        self._log_settings = loaded.settings.log
        self._known_warnings = set(loaded.settings.warnings)
        self._dynamic_level = DynamicLevel()
        self._level = ""
        self._may_write = True
        self._requested = False
        self._next = 0.0
        self.in_force: Reconfigure | None = (
            None  # for an endpoint that is forked later; None: nothing changed
        )

    def due(self) -> float:
        """When `poll` has something to do, in monotonic seconds."""
        return 0.0 if self._requested else self._next

    def request(self) -> None:
        """SIGHUP: read the file at the next `poll` whether it has changed or not, and the certificates."""
        self._requested = True

    def poll(self) -> Reconfigure | None:
        """What the endpoint is to be told; None when nothing."""
        now = time.monotonic()
        if now < self.due():
            return None
        self._next = now + POLL_S
        message = None
        stamp, requested = file_stamp(self._settings.config_file), self._requested
        if requested or stamp != self._stamp:
            self._stamp, self._requested = stamp, False
            message = self._reload(requested)
        self._follow_level()
        return message

    # -- the file -----------------------------------------------------------------------------------

    def _reload(self, requested: bool) -> Reconfigure | None:
        path = self._settings.config_file
        try:
            loaded = self._load(self._log_settings)
        except ConfigError as error:
            log.warning(
                "%s: %s, nothing is changed: %s; bin/mindieservice_daemon --check-config shows them by line",
                path, counted(len(error.findings), "error"), " | ".join(error.findings),
            )  # fmt: skip
            return None
        except Exception as error:  # whatever lies there: a service that serves goes on
            log.warning("%s cannot be read now, nothing is changed: %r", path, error)
            return None
        self._may_write = True  # perhaps it can be written by now
        self._tell_new_warnings(loaded)
        applied = self._apply(loaded)
        certificates = requested and self._certificates_usable()
        if certificates:
            applied.append("the certificates")
        waiting = self._needing_restart(loaded)
        log.info(
            "%s read again; applied: %s; needs a restart: %s",
            path, ", ".join(applied) or "nothing", ", ".join(waiting) or "nothing",
        )  # fmt: skip
        hot = any(key in HOT_KEYS for key in applied)
        if not hot and not certificates:
            return None
        message = self._message(certificates)
        if hot:
            self.in_force = self._message(reload_certificates=False)
        return message

    def _apply(self, loaded: LoadedConfig) -> list[str]:
        """Take over what may change while the service runs; the names of what did."""
        applied = []
        for path in sorted(HOT_KEYS):
            if self._differs(loaded, path):
                self._values.put(path, loaded.values.raw(path))
                applied.append(path)
        self._api_keys = loaded.settings.endpoint.api_keys
        if loaded.settings.log != self._log_settings:
            self._log_settings = loaded.settings.log
            applied.append("LogConfig")
        return applied

    def _needing_restart(self, loaded: LoadedConfig) -> list[str]:
        return [
            f"{path}={shown(value)}"
            for path, value in sorted(loaded.values.by_path().items())
            if path not in HOT_KEYS and self._differs(loaded, path)
        ]

    def _differs(self, loaded: LoadedConfig, path: str) -> bool:
        return not self._values.has(path) or bool(self._values.raw(path) != loaded.values.raw(path))

    def _tell_new_warnings(self, loaded: LoadedConfig) -> None:
        """What was said at the start, or at the last change, is not said again."""
        warnings = loaded.settings.warnings
        for warning in warnings:
            if warning not in self._known_warnings:
                log.warning("%s", warning)
        self._known_warnings = set(warnings)

    def _certificates_usable(self) -> bool:
        """Whether the files of the listeners, which cannot change, hold what can be served with."""
        listeners = self._settings.endpoint.listeners
        if not any(listener.tls for listener in listeners):
            return False
        try:
            for warning in check_listeners(listeners):
                log.warning("%s", warning)
        except StartupError as error:
            log.warning("the certificates stay as they are: %s", " | ".join(str(error).splitlines()))
            return False
        return True

    def _message(self, reload_certificates: bool) -> Reconfigure:
        token_timeout, e2e_timeout = effective_timeouts(self._values)
        return Reconfigure(
            openai_flavour="vllm" if self._values.text(f"{SERVER}.openAiSupport") == "vllm" else "openai",
            token_timeout_s=token_timeout,
            e2e_timeout_s=e2e_timeout,
            max_link_num=self._values.integer(f"{SERVER}.maxLinkNum"),
            max_waiting_tokens=self._values.integer(_WAITING_TOKENS),
            api_keys=tuple(astuple(key) for key in self._api_keys),
            reload_certificates=reload_certificates,
        )

    # -- the log level ------------------------------------------------------------------------------

    def _follow_level(self) -> None:
        """Set the level that holds now, and write down since when, or that its time is over."""
        level, write_back = self._dynamic_level.judge(self._log_settings, datetime.now())
        if level != self._level:
            self._level = level
            self._set_levels(level)
            log.info("log level: %s", level or "as MINDIE_LOG_LEVEL says")
        if write_back is not None and self._may_write and self._unchanged():
            self._write(write_back)

    def _unchanged(self) -> bool:
        """Whether the file is still the one that was read last."""
        return file_stamp(self._settings.config_file) == self._stamp

    def _write(self, settings: LogSettings) -> None:
        path = self._settings.config_file
        try:
            write_log_settings(path, settings)
        except (OSError, ValueError, LookupError) as error:
            self._may_write = False
            log.warning("%s cannot be written, the log level's time is kept in memory only: %s", path, error)
            return
        self._log_settings = settings
        self._stamp = file_stamp(path)
