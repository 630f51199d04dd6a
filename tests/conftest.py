"""Fixtures shared by everything that starts the daemon."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from tests.harness import Children, Daemon, Installation, Json, eventually


@pytest.fixture(scope="session", autouse=True)
def no_nohup() -> None:
    """The daemons under test get SIGHUP although the tests may run under nohup, which they would inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installation"))


@pytest.fixture
def make_daemon(installation: Installation) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons for one test; all are killed at its end and must then have left nothing."""
    made: list[Daemon] = []

    def make(changes: Json | None = None, **options: object) -> Daemon:
        made.append(installation.daemon(changes, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for daemon in made:
        if daemon.process is None:
            continue
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGKILL)
            daemon.process.wait()
        with contextlib.suppress(AssertionError):
            eventually(lambda d=daemon: not d.leftovers(), 5.0, "nothing left")  # type: ignore[misc]
        assert not daemon.leftovers()


@pytest.fixture
def children() -> Children:
    """Child processes of the tests' own process that were not there before this test."""
    process = psutil.Process()
    before = process.children(recursive=True)

    def fresh(recursive: bool = False) -> list[psutil.Process]:
        return [child for child in process.children(recursive) if child not in before]

    return fresh


@pytest.fixture(scope="module")
def server(installation: Installation) -> Iterator[Daemon]:
    """One running daemon for the tests of a module, over plain HTTP."""
    daemon = installation.daemon().start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="module")
def https_server(installation: Installation) -> Iterator[Daemon]:
    """One running daemon for the tests of a module, under mutual TLS as the stock config has it."""
    daemon = installation.daemon(https=True).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


# with two at a time, who takes long begins: else one core waits for the other at the end
_LONG = ("tests/e2e/test_lifecycle.py", "tests/reliability/test_healing.py", "tests/e2e/", "tests/npu_sim/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(_LONG) if item.nodeid.startswith(name)), len(_LONG))

    items.sort(key=turn)


def pytest_configure(config: pytest.Config) -> None:
    del config
    # how long one example takes is the machine's business; every test has a time limit of its own
    settings.register_profile("here", deadline=None)
    settings.load_profile("here")
    assert Path("/dev/shm").is_dir(), "these tests need /dev/shm"
