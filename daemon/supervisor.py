"""The parent: forks, waits, signals, reaps, replaces. It carries no request and imports nothing heavy.

States and what moves them:

    BOOTING --all children Ready--> SERVING --SIGTERM/SIGINT--> DRAINING --endpoint gone--> STOPPING
       |                              | ^                                                      |
       |                              | '-- a child dies: it is replaced                       '-- all reaped:
       |                              '---- five die within a minute: open streams get an          exit code
       '-- a child dies, deadline,          error event (DRAINING, a short deadline), code 6
           SIGTERM: STOPPING

How a death is healed: the dead child is reaped; the child at the other end of its link is told, closes its
end and says Quiet; the rings are reset; the link begins anew with the next generation (daemon/links.py), and
the replacement is forked. An endpoint is forked at once: it takes its listening sockets from here.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from daemon.doors import Doors
from daemon.family import Child, Family
from daemon.forks import Birth, Forker
from daemon.links import Links
from daemon.orphans import adopt_orphans, kill_stragglers
from daemon.plan import ProcessSpec
from daemon.reload import ConfigWatcher
from daemon.restarts import RestartPolicy
from daemon.signals import drain_signals
from engine.errors import EXIT_CHILD_DIED, EXIT_INIT, EXIT_OK
from engine.logs import START
from engine.logs.room import announce, audit
from engine.wire.links import InstanceWire
from engine.wire.messages import (
    Drain,
    Fatal,
    Hello,
    InstanceDown,
    Linked,
    Message,
    Progress,
    Quiet,
    Ready,
    StopRequested,
)
from engine.wire.vitals import Vitals

log = logging.getLogger("server.supervisor")

SUCCESS_LINE = "Daemon start success!"

_TERM_GRACE_S = 15.0  # between TERM and KILL
_DRAIN_SLACK_S = 3.0  # what the endpoint may need after its own deadline
_FAILED_DRAIN_S = 2.0  # to end open streams with an error event after a death
_LOOK_EVERY_S = 1.0  # at the children's pulses
_LOOKS = 2  # in a row that must find a deadline missed: after Ctrl+Z the children are late through no fault
_PROGRESS_EVERY_S = 5.0
_LAST_WORDS_S = 0.5  # a dying child's reason may arrive just after its SIGCHLD


class State(Enum):
    BOOTING = "booting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Limits:
    init_timeout_s: float
    graceful_stop_s: float


class Supervisor:
    """Runs the children of one daemon to their end; `run` returns the daemon's exit code."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        wires: Sequence[InstanceWire],
        forker: Forker,
        run_dir: Path,
        vitals: Vitals,
        limits: Limits,
        wakeup_fd: int,
        watcher: ConfigWatcher,
    ) -> None:
        """`wires`: one per instance. `run_dir`: from make_run_dir. `wakeup_fd`: from install_signal_pipe."""
        self._specs = specs
        self._family = Family()
        self._links = Links(wires, self._family)
        self._doors = Doors(run_dir, self._family)
        self._forker = forker
        self._vitals = vitals
        self._limits = limits
        self._wakeup_fd = wakeup_fd
        self._watcher = watcher
        self._policy = RestartPolicy()
        self._state = State.BOOTING
        self._deadline = 0.0
        self._next_look = 0.0
        self._exit_code = EXIT_OK
        self.has_served = False
        self._births = 0
        self._missing: dict[ProcessSpec, float] = {}  # to be forked, and not before when
        self._died: dict[ProcessSpec, float] = {}  # until the replacement serves

    def run(self) -> int:
        adopt_orphans()
        self._deadline = time.monotonic() + self._limits.init_timeout_s
        for spec in self._specs:
            self._fork(spec)
        self._doors.begin()
        try:
            while self._family or self._missing:
                select.select([self._wakeup_fd, *self._doors.filenos()], [], [], self._patience())
                for number in drain_signals(self._wakeup_fd):
                    self._on_signal(number)
                self._read_messages()
                self._reap()
                self._read_messages()
                self._keep_time()
        finally:
            self._doors.end()
            kill_stragglers()
        return self._exit_code

    # -- forking ------------------------------------------------------------------------------------

    def _fork(self, spec: ProcessSpec) -> None:
        self._missing.pop(spec, None)
        link = self._links[spec.instance]
        slot = self._specs.index(spec)
        pulse = self._vitals.pulse(slot)
        pulse.rest()
        generation = self._births if spec.role == "endpoint" else link.generation
        birth = Birth(spec, self._births, generation, pulse)
        self._births += 1
        pid = self._forker.fork(birth, self._doors.control_address)
        self._family.add(Child(birth, pid, time.monotonic() + self._limits.init_timeout_s))
        if spec.role == "worker" and spec.rank == 0:
            link.holders.add(birth.identity)
        log.info("%s pid=%d started", spec, pid)

    def _fork_missing(self, now: float) -> None:
        for spec, due in list(self._missing.items()):
            if due > now or not self._doors.open():
                continue
            if spec.role == "worker":
                link = self._links[spec.instance]
                # a half-dead group hangs: its ranks begin together, once the last of them has been reaped
                if any(child.doomed for child in self._family.workers(spec.instance)) or not link.mend():
                    continue
            try:
                self._fork(spec)
            except OSError as error:  # no processes or memory to be had, or no place for sockets
                log.error("%s cannot be started: %s", spec, error)
                self._on_death(spec, str(error))

    def _close_doors(self) -> None:
        """Once everybody is connected to everybody."""
        if not self._missing and not self._family.unready and self._links.complete:
            self._doors.close()

    # -- what happens -------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return  # reaping happens every turn
        if number == signal.SIGHUP:
            log.info("SIGHUP received: reading the configuration again")
            self._watcher.request()
            return
        name = signal.Signals(number).name
        if self._state is State.SERVING:
            log.warning("%s (%d) received: finishing running requests, then stopping", name, number)
            self._drain(self._limits.graceful_stop_s)
        elif self._state is State.BOOTING:
            log.warning("%s (%d) received while starting: stopping", name, number)
            self._stop()
        else:
            log.warning("%s (%d) received again: stopping at once", name, number)
            self._stop()
            self._family.signal(signal.SIGKILL)

    def _read_messages(self) -> None:
        for child, message in self._doors.receive():
            try:
                if message is None:
                    raise ValueError("no message")
                self._on_message(child, message)
            except (LookupError, TypeError, ValueError) as error:
                # fields that mean nothing: whatever is wrong with the child, it is not to end the parent
                self._condemn(child, f"what it says cannot be understood ({type(error).__name__})")

    def _on_message(self, child: Child, message: Message) -> None:
        match message:
            case Hello():
                self._links.join(self._doors.open)
            case Ready():
                self._on_ready(child, message.detail)
            case Quiet():
                link = self._links[message.instance]
                if message.generation == link.generation:
                    link.leave(child.identity)
                    self._links.join(self._doors.open)
            case Linked():
                self._on_linked(message)
            case Progress():
                self._on_progress(child, message)
            case Fatal():
                child.fatal = message
            case StopRequested() if self._state is State.SERVING:
                log.warning("stop requested over HTTP: at most %.0f s for running requests", message.drain_s)
                self._drain(message.drain_s)
            case _:
                log.warning("unexpected %s from %s", type(message).__name__, child.spec)

    def _on_ready(self, child: Child, detail: str) -> None:
        log.info("%s ready: %s", child, detail)
        child.ready = True
        self._policy.note_ready(child.spec)
        if child.is_endpoint:
            self._note_healed(child.spec)
            if self._watcher.in_force is not None:  # it was forked with what held at the start
                child.tell(self._watcher.in_force)
        if self._state is State.BOOTING and not self._family.unready:
            self._serve()
        self._close_doors()

    def _on_linked(self, message: Linked) -> None:
        link = self._links[message.instance]
        if message.generation == link.generation:
            link.complete = True
            for child in self._family.workers(message.instance):
                self._note_healed(child.spec)
            self._close_doors()

    def _note_healed(self, spec: ProcessSpec) -> None:
        died = self._died.pop(spec, None)
        if died is not None:
            log.warning("%s serves again, %.1f s after its death", spec, time.monotonic() - died)

    def _on_progress(self, child: Child, message: Progress) -> None:
        self._family.tell_endpoint(message)
        now = time.monotonic()
        line = child.pace.line(message, now)
        if message.fraction >= 1.0 or now - child.last_progress > _PROGRESS_EVERY_S:
            log.info("%s: %s", child.spec, line)
            child.last_progress = now

    def _reap(self) -> None:
        while self._family:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self._family.get(pid)
            if child is None:
                continue
            if os.waitstatus_to_exitcode(status) > 0 and child.fatal is None:
                self._await_last_words(child)
            self._family.remove(child)
            self._on_exit(child, os.waitstatus_to_exitcode(status))

    def _await_last_words(self, child: Child) -> None:
        until = time.monotonic() + _LAST_WORDS_S
        while child.fatal is None and time.monotonic() < until:
            select.select(self._doors.filenos(), [], [], 0.02)
            self._read_messages()

    def _on_exit(self, child: Child, code: int) -> None:
        """`code` as in os.waitstatus_to_exitcode: negative for a signal."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if self._state is State.STOPPING:
            log.info("%s %s", child, how)
            return
        if self._state is State.DRAINING and child.is_endpoint and code == 0:
            log.info("endpoint pid=%d has drained", child.pid)
            self._stop()
            return
        reason = child.verdict or (child.fatal.reason if child.fatal else how)
        if self._state is State.BOOTING:
            log.error("start failed: %s: %s", child, reason)
            self._exit_code = child.fatal.exit_code if child.fatal else EXIT_INIT
            self._stop()
            return
        if child.doomed:  # its link has been broken off already, and may have begun anew
            self._links.forget(child)
            self._links.join(self._doors.open)
            return
        self._links.part_with(child, reason, final=self._state is not State.SERVING)
        log.error("%s died: %s", child, reason)
        self._on_death(child.spec, reason)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            self._look_after_children(now)
        if self._state is State.SERVING:
            self._fork_missing(now)
            if (message := self._watcher.poll()) is not None:
                self._family.tell_endpoint(message)
        elif now >= self._deadline:
            self._on_deadline()

    def _patience(self) -> float:
        """Seconds until something is due."""
        due = [self._next_look, *self._missing.values()]
        due.append(self._watcher.due() if self._state is State.SERVING else self._deadline)
        # a fork that is due already waits for a message or a death, not for time
        now = time.monotonic()
        return min((at - now for at in due if at > now), default=0.0)

    def _on_deadline(self) -> None:
        if self._state is State.BOOTING:
            waiting = ", ".join(str(child.spec) for child in self._family.unready)
            log.error("start failed: %s", self._not_ready(waiting))
            self._exit_code = EXIT_INIT
            self._stop()
        elif self._state is State.DRAINING:
            log.warning("the endpoint did not end in time")
            self._stop()
        elif self._state is State.STOPPING:
            names = ", ".join(map(str, self._family))
            log.warning("still alive %.0f s after TERM, killing: %s", _TERM_GRACE_S, names)
            self._family.signal(signal.SIGKILL)
            self._deadline = time.monotonic() + _TERM_GRACE_S

    def _not_ready(self, who: str) -> str:
        return (
            f"not ready after {self._limits.init_timeout_s:.0f} s: {who}; a larger "
            "BackendConfig.runtimeConfig.workerInitTimeoutSec allows more time"
        )

    # -- healing ------------------------------------------------------------------------------------

    def _look_after_children(self, now: float) -> None:
        """End those that have missed their own deadline, or that do not get ready."""
        if self._state is State.STOPPING:
            return
        for child in self._family:
            if child.verdict:
                os.kill(child.pid, signal.SIGKILL)  # it was given a second for the stacks
                continue
            overdue_s = self._vitals.overdue_s(self._specs.index(child.spec))
            child.looks_overdue = child.looks_overdue + 1 if overdue_s > 0 else 0
            if child.looks_overdue >= _LOOKS:
                limit = "BackendConfig.runtimeConfig.stepTimeoutSec"
                self._condemn(child, f"no progress, {overdue_s:.0f} s beyond its time limit ({limit})")
            elif self._state is State.SERVING and not child.ready and now >= child.boot_deadline:
                self._condemn(child, self._not_ready(str(child.spec)))

    def _condemn(self, child: Child, verdict: str) -> None:
        """End it: now if it can, at the next look if it cannot."""
        if not child.verdict:
            child.verdict = verdict
            log.error("%s: %s; ending it", child, verdict)
            os.kill(child.pid, signal.SIGABRT)  # faulthandler writes where it hangs, unless it is stopped

    def _on_death(self, spec: ProcessSpec, reason: str) -> None:
        """A child is no more, and its links have been broken off: replace it, or give up."""
        now = time.monotonic()
        delay = self._policy.note_death(spec, now) if self._state is State.SERVING else None
        if delay is None:
            self._give_up(spec, reason)
            return
        self._died.setdefault(spec, now)
        group = [s for s in self._specs if (s.role, s.instance) == (spec.role, spec.instance)]
        self._missing |= dict.fromkeys(group, now + delay)
        for rank in self._family.workers(spec.instance) if spec.role == "worker" else ():
            rank.doomed = True
            os.kill(rank.pid, signal.SIGKILL)
        self._links.join(self._doors.open)

    def _give_up(self, spec: ProcessSpec, reason: str) -> None:
        self._exit_code = EXIT_CHILD_DIED
        if self._state is State.SERVING:
            log.error("%s, stopping the service; the last was %s: %s", self._policy.verdict, spec, reason)
            for link in self._links:
                self._family.tell_endpoint(InstanceDown(link.wire.instance, reason, final=True))
            self._drain(_FAILED_DRAIN_S)
        elif spec.role == "endpoint":
            self._stop()

    # -- what is done about it ----------------------------------------------------------------------

    def _serve(self) -> None:
        self._state = State.SERVING
        self.has_served = True
        audit("system", "start endpoint", "success")
        audit("system", "start mindie server", "success")
        logging.getLogger(START).info(SUCCESS_LINE)
        announce(SUCCESS_LINE)

    def _drain(self, seconds: float) -> None:
        endpoint = self._family.endpoint
        if endpoint is None or not endpoint.ready:  # nobody is served
            self._stop()
            return
        self._state = State.DRAINING
        self._deadline = time.monotonic() + seconds + _DRAIN_SLACK_S
        endpoint.tell(Drain(seconds))
        for spec in self._missing:
            if spec.role == "worker":  # after the Drain: else it would look like giving up
                endpoint.tell(InstanceDown(spec.instance, "the service is stopping", final=True))
        self._missing.clear()

    def _stop(self) -> None:
        self._state = State.STOPPING
        self._missing.clear()
        self._deadline = time.monotonic() + _TERM_GRACE_S
        self._forker.close_listeners()
        self._family.signal(signal.SIGTERM)
