"""The parent: forks, waits, signals, reaps. It carries no request and imports nothing heavy.

States and what moves them:

    BOOTING --all children Ready--> SERVING --SIGTERM/SIGINT--> DRAINING --endpoint gone--> STOPPING
       |                               |                                                       |
       '-- a child dies, deadline,     '-- a child dies: open streams get an error             '-- all reaped:
           SIGTERM: STOPPING               event (DRAINING, a short deadline), code 6              exit code
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FrameType

import psutil
import zmq

from daemon.child import run_child
from daemon.plan import ProcessSpec
from engine.errors import EXIT_CHILD_DIED, EXIT_INIT, EXIT_OK
from engine.wire.channel import ControlHub
from engine.wire.links import ENDPOINT, Control
from engine.wire.messages import Drain, Fatal, InstanceDown, Message, Progress, Ready, StopRequested

log = logging.getLogger("server.supervisor")

SUCCESS_LINE = "Daemon start success!"

_TERM_GRACE_S = 15.0  # between TERM and KILL
_DRAIN_SLACK_S = 3.0  # what the endpoint may need after its own deadline
_FAILED_DRAIN_S = 2.0  # to end open streams with an error event after a death
_IDLE_TURN_S = 3600.0  # nothing is due while serving
_PROGRESS_EVERY_S = 5.0
_LAST_WORDS_S = 0.5  # a dying child's reason may arrive just after its SIGCHLD

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_PR_SET_CHILD_SUBREAPER = 36

Entry = Callable[[ProcessSpec, Control], int]


class State(Enum):
    BOOTING = "booting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(slots=True)
class Child:
    spec: ProcessSpec
    pid: int
    ready: bool = False
    last_progress: float = 0.0  # when it was last logged
    fatal: Fatal | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    init_timeout_s: float
    graceful_stop_s: float


class Supervisor:
    """Runs the children of one daemon to their end; `run` returns the daemon's exit code."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        entry: Entry,
        listeners: Sequence[socket.socket],
        control_address: str,
        limits: Limits,
        wakeup_fd: int,
        on_serving: Callable[[], None],
    ) -> None:
        """`wakeup_fd`: from install_signal_pipe. `on_serving` is called once, when all children are ready."""
        self._specs = specs
        self._entry = entry
        self._listeners = listeners
        self._control_address = control_address
        self._limits = limits
        self._wakeup_fd = wakeup_fd
        self._on_serving = on_serving
        self._state = State.BOOTING
        self._deadline = 0.0
        self._exit_code = EXIT_OK
        self._children: dict[int, Child] = {}
        self._hub: ControlHub | None = None

    def run(self) -> int:
        wakeup_fd = self._wakeup_fd
        _adopt_orphans()
        self._deadline = time.monotonic() + self._limits.init_timeout_s
        self._fork_all()
        # libzmq starts threads with its context, so not before the forks
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._hub = ControlHub(context, self._control_address)
        try:
            while self._children:
                timeout = max(0.0, self._deadline - time.monotonic())
                select.select([wakeup_fd, self._hub.fileno()], [], [], timeout)
                for number in _drain_signals(wakeup_fd):
                    self._on_signal(number)
                self._read_messages()
                self._reap()
                self._read_messages()
                if time.monotonic() >= self._deadline:
                    self._on_deadline()
        finally:
            self._hub.close()
            context.term()
            _kill_stragglers()
        return self._exit_code

    # -- forking ------------------------------------------------------------------------------------

    def _fork_all(self) -> None:
        lifeline_read, lifeline_write = os.pipe()
        parent_pid = os.getpid()
        _flush_stderr()
        # a signal that met a child before it has its own handlers would be written to our pipe
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        for spec in self._specs:
            pid = os.fork()
            if pid == 0:
                os.close(lifeline_write)  # only the parent's end may keep the pipe open
                os.close(self._wakeup_fd)
                if spec.role != "endpoint":
                    for sock in self._listeners:
                        sock.close()
                entry = partial(self._entry, spec)
                run_child(parent_pid, lifeline_read, self._control_address, spec.identity, entry)
            self._children[pid] = Child(spec, pid)
            log.info("%s pid=%d started", spec, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        os.close(lifeline_read)
        for sock in self._listeners:
            sock.close()

    # -- what happens -------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return  # reaping happens every turn
        name = signal.Signals(number).name
        if self._state is State.SERVING:
            log.warning("%s (%d) received: finishing running requests, then stopping", name, number)
            self._drain(self._limits.graceful_stop_s)
        elif self._state is State.BOOTING:
            log.warning("%s (%d) received while starting: stopping", name, number)
            self._stop()
        else:
            log.warning("%s (%d) received again: stopping at once", name, number)
            self._state = State.STOPPING
            self._deadline = time.monotonic() + _TERM_GRACE_S
            self._signal_children(signal.SIGKILL)

    def _read_messages(self) -> None:
        assert self._hub is not None
        for identity, message in self._hub.receive():
            child = next((c for c in self._children.values() if c.spec.identity == identity), None)
            if child is not None:
                self._on_message(child, message)

    def _on_message(self, child: Child, message: Message) -> None:
        match message:
            case Ready():
                log.info("%s pid=%d ready: %s", child.spec, child.pid, message.detail)
                child.ready = True
                if self._state is State.BOOTING and all(c.ready for c in self._children.values()):
                    self._serve()
            case Progress():
                self._tell_endpoint(message)
                now = time.monotonic()
                if message.fraction >= 1.0 or now - child.last_progress > _PROGRESS_EVERY_S:
                    log.info("%s: %s %.0f %%", child.spec, message.phase, message.fraction * 100)
                    child.last_progress = now
            case Fatal():
                child.fatal = message
            case StopRequested() if self._state is State.SERVING:
                log.warning("stop requested over HTTP: at most %.0f s for running requests", message.drain_s)
                self._drain(message.drain_s)
            case _:
                log.warning("unexpected %s from %s", type(message).__name__, child.spec)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self._children.get(pid)
            if child is None:
                continue
            if os.waitstatus_to_exitcode(status) > 0 and child.fatal is None:
                self._await_last_words(child)
            del self._children[pid]
            self._on_exit(child, os.waitstatus_to_exitcode(status))

    def _await_last_words(self, child: Child) -> None:
        assert self._hub is not None
        until = time.monotonic() + _LAST_WORDS_S
        while child.fatal is None and time.monotonic() < until:
            select.select([self._hub.fileno()], [], [], 0.02)
            self._read_messages()

    def _on_exit(self, child: Child, code: int) -> None:
        """`code` as in os.waitstatus_to_exitcode: negative for a signal."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if self._state is State.STOPPING:
            log.info("%s pid=%d %s", child.spec, child.pid, how)
            return
        is_endpoint = child.spec.role == "endpoint"
        if self._state is State.DRAINING and is_endpoint and code == 0:
            log.info("endpoint pid=%d has drained", child.pid)
            self._stop()
            return
        reason = child.fatal.reason if child.fatal else how
        if self._state is State.BOOTING:
            log.error("start failed: %s pid=%d: %s", child.spec, child.pid, reason)
            self._exit_code = child.fatal.exit_code if child.fatal else EXIT_INIT
            self._stop()
            return
        log.error("%s pid=%d died: %s; stopping the service", child.spec, child.pid, reason)
        self._exit_code = EXIT_CHILD_DIED
        if is_endpoint:
            self._stop()
            return
        self._tell_endpoint(InstanceDown(child.spec.instance, reason))
        if self._state is State.SERVING:
            self._drain(_FAILED_DRAIN_S)

    def _on_deadline(self) -> None:
        if self._state is State.BOOTING:
            waiting = ", ".join(str(c.spec) for c in self._children.values() if not c.ready)
            log.error(
                "start failed: not ready after %.0f s: %s; a larger "
                "BackendConfig.runtimeConfig.workerInitTimeoutSec allows more time",
                self._limits.init_timeout_s, waiting,
            )  # fmt: skip
            self._exit_code = EXIT_INIT
            self._stop()
        elif self._state is State.DRAINING:
            log.warning("the endpoint did not end in time")
            self._stop()
        elif self._state is State.STOPPING:
            names = ", ".join(f"{c.spec} pid={c.pid}" for c in self._children.values())
            log.warning("still alive %.0f s after TERM, killing: %s", _TERM_GRACE_S, names)
            self._signal_children(signal.SIGKILL)
            self._deadline = time.monotonic() + _TERM_GRACE_S
        else:
            self._deadline = time.monotonic() + _IDLE_TURN_S

    # -- what is done about it ----------------------------------------------------------------------

    def _serve(self) -> None:
        self._state = State.SERVING
        self._deadline = time.monotonic() + _IDLE_TURN_S
        self._on_serving()
        log.info(SUCCESS_LINE)
        try:
            print(SUCCESS_LINE, flush=True)
        except OSError as error:  # nobody reads it, or the disk is full: that is no reason not to serve
            log.warning("standard output cannot be written: %s", error.strerror)
            sys.stdout = None  # else the interpreter tries again at exit

    def _drain(self, seconds: float) -> None:
        self._state = State.DRAINING
        self._deadline = time.monotonic() + seconds + _DRAIN_SLACK_S
        self._tell_endpoint(Drain(seconds))

    def _stop(self) -> None:
        self._state = State.STOPPING
        self._deadline = time.monotonic() + _TERM_GRACE_S
        self._signal_children(signal.SIGTERM)

    def _tell_endpoint(self, message: Message) -> None:
        assert self._hub is not None
        self._hub.send(ENDPOINT, message)

    def _signal_children(self, number: int) -> None:
        """Recorded pids only, never a group: the terminal's group is not ours alone."""
        for pid in self._children:
            os.kill(pid, number)  # not yet reaped, so the pid is still theirs


def install_signal_pipe() -> int:
    """Let TERM, INT and CHLD write their number to a pipe; all work happens in the loop that reads it."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in _HANDLED:
        signal.signal(number, _nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)  # launch.py holds them back until now
    return read_fd


def _nothing(number: int, frame: FrameType | None) -> None:
    """A Python handler must exist for the wakeup fd to be written."""


def _drain_signals(read_fd: int) -> bytes:
    try:
        return os.read(read_fd, 4096)
    except BlockingIOError:
        return b""


def _kill_stragglers() -> None:
    """End grandchildren (operator compilers of a device stack) that outlived their parents."""
    stragglers = psutil.Process().children(recursive=True)
    for process in stragglers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stragglers, timeout=_LAST_WORDS_S)


def _adopt_orphans() -> None:
    """Make orphaned grandchildren our children instead of init's, so that they can be found at the end."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _flush_stderr() -> None:
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.flush()
