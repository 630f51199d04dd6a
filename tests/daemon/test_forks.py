"""What a fork leaves in the parent, and what a child begins with."""

from __future__ import annotations

import json
import os
import signal
from typing import NoReturn

import pytest

from daemon import forks
from daemon.forks import Birth, Forker
from daemon.plan import ProcessSpec
from daemon.signals import HANDLED
from engine.errors import EXIT_INIT
from engine.wire.vitals import Vitals

BIRTH = Birth(ProcessSpec("worker", 0, 0, 0), 3, 1, Vitals(1).pulse(0))


@pytest.fixture
def forker() -> Forker:
    return Forker(lambda birth, control: 0, [], os.open(os.devnull, os.O_RDONLY))


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_that_fails_leaves_no_signal_blocked(forker: Forker, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_processes() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_processes)
    with pytest.raises(OSError, match="temporarily unavailable"):
        forker.fork(BIRTH, "ipc:///nowhere")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(HANDLED)


def test_a_child_that_cannot_begin_is_no_second_parent(
    forker: Forker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors() -> set[int]:
        raise OSError(24, "Too many open files")

    forker.settle()
    monkeypatch.setattr(forks, "_open_fds", no_descriptors)
    assert exit_code(forker.fork(BIRTH, "ipc:///nowhere")) == EXIT_INIT


def test_what_the_parent_opens_later_is_closed_in_a_child(
    forker: Forker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, tell = os.pipe()

    def report(*_: object) -> NoReturn:
        numbers = [fd for fd in range(4096) if os.path.exists(f"/proc/self/fd/{fd}")]
        os.write(tell, json.dumps(numbers).encode())
        os._exit(0)

    monkeypatch.setattr(forks, "run_child", report)
    forker.settle()
    later = os.open(os.devnull, os.O_RDONLY)  # gets the lowest number that was free
    assert exit_code(forker.fork(BIRTH, "ipc:///nowhere")) == 0
    inherited = json.loads(os.read(told, 1 << 16))
    assert tell in inherited and later not in inherited
