#!/usr/bin/env python3
"""Run what is written for Ascend NPUs on a machine that has none: torch_npu itself on a stand-in runtime.

    python scripts/npu_sim.py build                   fetch torch_npu (44 MB), generate its runtime
    python scripts/npu_sim.py run -- python prog.py   a command in whose Python processes torch_npu works
    python scripts/npu_sim.py serve                   the whole server, deviceType npu, an instance per device

Operators compute what their descriptions say, by torch's CPU kernels; with --no-arithmetic they only count
their launches. tests/npu_sim/README.md says what that proves and what not: nothing about the chip.

gcc, nm and a Python with torch 2.13 are needed. Everything is kept in the environment's cache/npu_sim, or in
NPU_SIM_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from npu_stand_in.environment import StandIn, default_home
from npu_stand_in.unavailable import Unavailable
from own_daemon import HOST, NAME, TINY_MODEL, configuration, own_daemon

_MOST_DEVICES = 64  # as many as the stand-in runtime has room for


def _devices(text: str) -> int:
    count = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= count <= _MOST_DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices; 1 to {_MOST_DEVICES}")
    return count


def _environ(stand_in: StandIn, options: argparse.Namespace) -> dict[str, str]:
    return stand_in.environ(
        os.environ,
        devices=options.devices,
        memory_mib=options.memory_mib,
        chip=options.chip,
        arithmetic=options.arithmetic,
    )


def run(options: argparse.Namespace) -> int:
    """Become the command."""
    environ = _environ(StandIn.build(default_home()), options)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise Unavailable("run: no command; for example: npu_sim.py run -- python -c 'import torch_npu'")
    try:
        os.execvpe(command[0], command, environ)
    except OSError as error:
        raise Unavailable(f"run: {command[0]}: {error.strerror}") from error


def serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl+C: one model instance on each simulated device."""
    os.environ.update(_environ(StandIn.build(default_home()), options))
    backend = {
        "modelInstanceNumber": options.devices,
        "npuDeviceIds": [[device] for device in range(options.devices)],
        "runtimeConfig": {"deviceType": "npu"},
    }
    config = configuration({"BackendConfig": backend}, mock=False, model=options.model)
    if options.port:
        config["ServerConfig"]["port"] = options.port
    stopped = threading.Event()
    with own_daemon(config) as daemon:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        body = {"model": NAME, "max_tokens": 24, "messages": [{"role": "user", "content": "Who are you?"}]}
        print(
            f"serving {options.model.name} on {options.devices} simulated {options.chip}, "
            f"log in {daemon.log_file}; Ctrl+C ends it. In another shell:\n"
            f"curl -s http://{HOST}:{daemon.port}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'",
            flush=True,
        )
        stopped.wait()
    return 0


def build(options: argparse.Namespace) -> int:
    del options
    stand_in = StandIn.build(default_home())
    print(f"torch_npu in {stand_in.wheel}\nits runtime in {stand_in.libraries}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="build | run | serve")
    commands.add_parser("build", help="fetch and generate what is missing").set_defaults(do=build)
    for do, what in ((run, "start a command with it"), (serve, "start the server on it")):
        one = commands.add_parser(do.__name__, help=what)
        one.set_defaults(do=do)
        one.add_argument("--devices", type=_devices, default=2, help="simulated devices (2)")
        one.add_argument("--memory-mib", type=int, default=4096, help="memory of each, per process (4096)")
        one.add_argument("--chip", default="Ascend910B1", help="its name (Ascend910B1)")
        one.add_argument(
            "--no-arithmetic", dest="arithmetic", action="store_false", help="count launches only"
        )
        if do is run:
            one.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND [ARGUMENT ...]")
        else:
            one.add_argument("--model", type=Path, default=TINY_MODEL, help="model directory (mindie-tiny)")
            one.add_argument("--port", type=int, default=0, help="business port (a free one)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.do(options))
    except Unavailable as reason:
        print(f"npu_sim.py: {reason}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # the daemon's log, when it does not start
        print(f"npu_sim.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
