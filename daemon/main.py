"""Composition root: command line, configuration, cheap checks, then the supervisor."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import shutil
import socket
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from daemon.addresses import bind_listeners
from daemon.config import load_config
from daemon.config_check import check_config, url
from daemon.forks import Birth, Forker
from daemon.plan import plan_processes
from daemon.reload import ConfigWatcher
from daemon.rundir import make_run_dir, run_name, sweep_stale
from daemon.signals import install_signal_pipe
from daemon.supervisor import Limits, Supervisor
from endpoint.context import EndpointContext
from endpoint.tls import check_listeners
from engine.errors import EXIT_OK, EXIT_USAGE, StartupError
from engine.logs import START
from engine.logs.room import audit, open_logs, reset_levels, set_levels
from engine.settings import ServerSettings
from engine.title import hide_interpreter, set_process_name
from engine.wire import sizes
from engine.wire.keepsake import Keepsake
from engine.wire.links import Control, InstanceWire
from engine.wire.ring import create_ring
from engine.wire.vitals import Vitals
from worker.context import WorkerContext

log = logging.getLogger("server.main")

VERSION = "0.1.0"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        options = ", ".join(
            sorted(
                option
                for action in self._actions
                for option in action.option_strings
                if option.startswith("--")
            )
        )
        print(f"{self.prog}: {message}; accepted options: {options}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def parse_command_line(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="mindieservice_daemon", description="LLM serving daemon.", allow_abbrev=False)
    parser.add_argument("--config-file", type=Path, metavar="PATH", help="configuration file")
    parser.add_argument(
        "--expert-parallel", choices=["true", "false"], default="false",
        help="accepted for compatibility; true has no effect",
    )  # fmt: skip
    parser.add_argument(
        "--check-config", action="store_true", help="validate the configuration only, exit 0 or 1"
    )
    parser.add_argument("--version", action="version", version=f"mindieservice_daemon {VERSION}")
    if len(arguments) > 256:
        parser.error(f"{len(arguments)} arguments; at most 256 are accepted")
    return parser.parse_args(arguments)


def main() -> int:
    _hold_standard_streams()
    wakeup_fd = install_signal_pipe()  # early: from here on a signal means an orderly stop
    set_process_name()
    hide_interpreter()
    options = parse_command_line(sys.argv[1:])
    environ = dict(os.environ)
    open_logs(environ, to_files=not options.check_config)
    # memory holds user text: no core file unless the operator raises the limit again
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    executable = Path(sys.argv[0]).absolute()
    if options.check_config:
        return check_config(options.config_file, environ, executable)
    try:
        load = partial(load_config, options.config_file, environ, executable)
        loaded = load()
        settings = loaded.settings
        for note in settings.notes:
            log.info("%s", note)
        for warning in settings.warnings:
            log.warning("%s", warning)
        for warning in check_listeners(settings.endpoint.listeners):
            log.warning("%s", warning)
        if options.expert_parallel == "true":
            log.warning("--expert-parallel true is not supported by this build and has no effect")
        return _serve(settings, ConfigWatcher(loaded, load, _set_levels), wakeup_fd)
    except StartupError as error:
        # written as it is: several findings are several lines
        print(error, file=sys.stderr, flush=True)
        logging.getLogger(START).error("%s", error)
        audit("system", "start mindie server", "fail")
        return error.exit_code


def _hold_standard_streams() -> None:
    """Of those we were started without, so that no file of ours gets their number and is printed into."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)


def _set_levels(text: str) -> None:
    """LogConfig's level, in all processes; "" = the environment's."""
    if text:
        set_levels(text)
    else:
        reset_levels()


def _serve(settings: ServerSettings, watcher: ConfigWatcher, wakeup_fd: int) -> int:
    """Cheap failures first, in the order of operations.md section 2; then fork."""
    for listener in settings.endpoint.listeners:
        log.info("%s plane: %s", "+".join(listener.planes), url(listener))
    if not os.access(os.getcwd(), os.W_OK):
        log.warning("%s is not writable; device compilers write kernel_meta* there", os.getcwd())
    sockets = bind_listeners(settings.endpoint.listeners)
    sweep_stale(settings.ipc_dir)
    name = run_name()
    run_dir = make_run_dir(settings.ipc_dir, name)
    try:
        return _supervise(settings, watcher, sockets, name, run_dir, wakeup_fd)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def _supervise(
    settings: ServerSettings,
    watcher: ConfigWatcher,
    sockets: list[socket.socket],
    name: str,
    run_dir: Path,
    wakeup_fd: int,
) -> int:
    # torch would import torch_npu with itself wherever that is installed, and fail with it where CANN is not
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    wires = [_make_wire(settings, name, run_dir, instance) for instance in range(len(settings.device_ids))]
    specs = plan_processes(settings)
    keepsake = Keepsake()
    num_workers = len(specs) - 1

    def entry(birth: Birth, control: Control) -> int:
        """What a child does; imports here, because the parent must never load aiohttp or torch."""
        spec = birth.spec
        if spec.role == "endpoint":
            from endpoint.main import run_endpoint

            set_process_name()
            return run_endpoint(
                EndpointContext(
                    settings.endpoint,
                    settings.schedule,
                    settings.model,
                    sockets,
                    wires,
                    control,
                    birth.pulse,
                    settings.step_timeout_s,
                    replaces_another=birth.generation > 0,
                )
            )
        given = WorkerContext(
            settings.model,
            settings.schedule,
            wires[spec.instance],
            birth.generation,
            spec.device,
            spec.rank,
            len(settings.device_ids[spec.instance]),
            num_workers,
            settings.worker_init_timeout_s,
            settings.step_timeout_s,
            control,
            birth.pulse,
            keepsake,
        )
        if settings.model.instance_type == "StandardMock":
            from worker.mock import run_mock_worker

            return run_mock_worker(given)
        from worker.environment import prepare_environment

        prepare_environment()
        from worker.main import run_worker

        set_process_name()  # importing torch is reported to rename the thread
        return run_worker(given)

    limits = Limits(settings.worker_init_timeout_s, settings.graceful_stop_timeout_s)
    log.info("configuration %s, %d worker(s)", settings.config_file, num_workers)
    forker = Forker(entry, sockets, wakeup_fd)
    vitals = Vitals(len(specs))
    supervisor = Supervisor(specs, wires, forker, run_dir, vitals, limits, wakeup_fd, watcher)
    code = supervisor.run()
    event = "stop mindie server" if supervisor.has_served or code == EXIT_OK else "start mindie server"
    audit("system", event, "success" if code == EXIT_OK else "fail")
    return code


def _make_wire(settings: ServerSettings, name: str, run_dir: Path, instance: int) -> InstanceWire:
    prompt_bytes = sizes.prompt_slot_bytes(settings.schedule.max_input_len)
    return InstanceWire(
        instance=instance,
        directory=str(run_dir),
        prompt_ring=create_ring(f"{name}_prompt{instance}", sizes.PROMPT_SLOTS, prompt_bytes),
        token_ring=create_ring(f"{name}_token{instance}", sizes.TOKEN_SLOTS, sizes.TOKEN_SLOT_BYTES),
        step_rings=tuple(
            create_ring(f"{name}_step{instance}.{rank}", sizes.STEP_SLOTS, sizes.STEP_SLOT_BYTES)
            for rank in range(1, len(settings.device_ids[instance]))
        ),
    )
