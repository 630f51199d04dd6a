"""A26, P9: what our processes say to each other is for nobody else on the machine."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import zmq

from engine.wire import messages as m
from engine.wire.channel import Channel, ControlHub
from tests.e2e.endpoints import NAME
from tests.harness import SUCCESS, TINY_MODEL, Daemon, Installation, eventually, model_config
from tests.reliability.abused import COMPLETIONS, abused, assert_served

MakeDaemon = Callable[..., Daemon]
MOCK = model_config(modelName=NAME, modelWeightPath=str(TINY_MODEL), modelInstanceType="StandardMock")
NOBODY = 65534
WAIT_MS = 500  # of somebody who must not get in


def modes_of_files(daemon: Daemon) -> dict[str, int]:
    """Modes of the socket directory, of what lies in it, and of our names in /dev/shm, as of now."""
    found = {}
    for place in (tempfile.gettempdir(), "/dev/shm"):
        for path in Path(place).glob(f"mindie_*_{daemon.pid}_*"):
            for one in (path, *(path.iterdir() if path.is_dir() else ())):
                with contextlib.suppress(FileNotFoundError):
                    found[str(one)] = one.stat().st_mode
    return found


def family(daemon: Daemon) -> list[psutil.Process]:
    parent = psutil.Process(daemon.pid)
    return [parent, *parent.children(recursive=True)]


def assert_private(modes: dict[str, int]) -> None:
    for path, mode in modes.items():
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path


def test_A26_P9_files_are_for_our_user_only(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(MOCK).start()
    seen: dict[str, int] = {}

    def started() -> bool:
        seen.update(modes_of_files(daemon))
        return SUCCESS in daemon.stdout

    eventually(started, 60.0, "success line")
    assert_served(daemon)
    assert any(stat.S_ISDIR(mode) for mode in seen.values())
    assert any(stat.S_ISSOCK(mode) for mode in seen.values())
    assert_private(seen)
    assert_private(modes_of_files(daemon))


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    """With the process that tries grammars out."""
    with abused(installation) as daemon:
        assert COMPLETIONS.ask(daemon, max_tokens=2, guided_regex="[ab]+").status == 200
        yield daemon


def shared_memory(process: psutil.Process) -> Iterator[tuple[str, os.stat_result]]:
    """Mappings that come from /dev/shm, and whose memory that is."""
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith("/dev/shm/"):
            yield path, os.stat(f"/proc/{process.pid}/map_files/{addresses}")


def test_P9_shared_memory_is_for_our_user_only_and_has_no_name(daemon: Daemon) -> None:
    try:
        segments = [segment for process in family(daemon) for segment in shared_memory(process)]
    except PermissionError:
        pytest.skip("reading /proc/PID/map_files takes CAP_CHECKPOINT_RESTORE")
    assert {Path(path).name.rpartition("_")[2].split()[0] for path, _ in segments} == {"prompt0", "token0"}
    for path, status in segments:
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid()), path
        assert status.st_nlink == 0, path


def test_P9_only_the_three_planes_listen_and_only_on_loopback(daemon: Daemon) -> None:
    listening = set()
    for process in family(daemon):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert ipaddress.ip_address(connection.laddr.ip).is_loopback
                listening.add(connection.laddr.port)
            else:
                assert connection.type == socket.SOCK_STREAM  # no datagrams to anybody
        names = [connection.laddr for connection in process.net_connections("unix")]
        # an abstract name has no mode, so everybody may connect to it
        assert not [name for name in names if name.startswith(("@", "\0"))]
    assert listening == {daemon.port, daemon.management_port, daemon.metrics_port}
    assert_served(daemon)


# -- somebody who gets at a socket all the same -------------------------------------------------------


@pytest.fixture
def open_house() -> Iterator[str]:
    """The address of a socket in a directory that everybody may enter."""
    directory = Path(tempfile.mkdtemp(prefix="mindie_test_"))
    directory.chmod(0o711)
    yield f"ipc://{directory}/evt"
    shutil.rmtree(directory)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.term()


def intrude(address: str, kind: int, uid: int) -> int:
    """Send as another user, from a process of its own: its exit code, 0 when all was sent."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.setuid(uid)
            intruder = Channel(zmq.Context(), kind, address, identity="worker.0.0")
            if intruder.wait_connected(WAIT_MS / 1e3):
                intruder.send(m.Fatal(1, "not from us"))
            intruder.close()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be somebody else")
@pytest.mark.parametrize("kind", [zmq.PUSH, zmq.DEALER], ids=["channel", "control"])
def test_A26_another_user_is_not_heard_even_with_the_modes_open(
    open_house: str, context: zmq.Context[zmq.Socket[bytes]], kind: int
) -> None:
    host: Channel | ControlHub
    if kind == zmq.PUSH:
        host = Channel(context, zmq.PULL, open_house, bind=True)
    else:
        host = ControlHub(context, open_house)
    with closing(host):
        Path(open_house.removeprefix("ipc://")).chmod(0o666)
        assert intrude(open_house, kind, NOBODY) == 0
        message = m.Ready("ours")
        expected = message if kind == zmq.PUSH else ("worker.0.0", message)
        assert first_heard(host, open_house, context, kind, message) == [expected]


def test_A26_a_frame_beyond_the_cap_is_dropped_with_its_sender(
    open_house: str, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    with (
        closing(Channel(context, zmq.PULL, open_house, bind=True)) as host,
        context.socket(zmq.PUSH) as flood,
    ):
        flood.setsockopt(zmq.LINGER, 0)
        flood.connect(open_house)
        flood.send(b"\xc4" + bytes(2 << 20))
        assert first_heard(host, open_house, context, zmq.PUSH, m.Abort(7, -1)) == [m.Abort(7, -1)]


def first_heard(
    host: Channel | ControlHub,
    address: str,
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    message: m.Message,
) -> list[object]:
    """What has arrived by the time when a peer of our own has been heard."""
    heard: list[object] = []

    def arrived() -> bool:
        heard.extend(host.receive())
        return bool(heard)

    with closing(Channel(context, kind, address, identity="worker.0.0")) as ours:
        assert ours.wait_connected(5.0)
        ours.send(message)
        eventually(arrived, 5.0, "our message")
    return heard
