"""Rotating files, standard streams nobody reads, and what is said about lines that were lost."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.logs.levels import apply_levels
from engine.logs.options import Rotation
from engine.logs.places import Refused, RotatingFile, Sink, StandardStream

NINE = b"12345678\n"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_current_file_keeps_its_name_and_the_newest_backup_is_01(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path, "x_1_2", Rotation(max_bytes=20, files=3))
    for number in range(7):
        file.append([b"line %d \n" % number])
    file.close()
    read = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert read == {
        "x_1_2.log": b"line 6 \n",
        "x_1_2.01.log": b"line 4 \nline 5 \n",
        "x_1_2.02.log": b"line 2 \nline 3 \n",
    }
    assert mode(tmp_path / "x_1_2.log") == 0o640
    assert {mode(tmp_path / f"x_1_2.0{n}.log") for n in (1, 2)} == {0o440}


def test_many_lines_at_once_rotate_too_and_one_too_long_stands_alone(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path, "x", Rotation(max_bytes=20, files=64))
    file.append([NINE, NINE, NINE, b"x" * 50 + b"\n", NINE])
    file.close()
    assert [(tmp_path / name).stat().st_size for name in names(tmp_path)] == [51, 9, 18, 9]


def test_one_file_has_no_backup(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path, "x", Rotation(max_bytes=10, files=1))
    file.append([NINE, NINE])
    file.close()
    assert names(tmp_path) == ["x.log"] and (tmp_path / "x.log").read_bytes() == NINE


def test_folders_that_are_made_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = RotatingFile(tmp_path / "base" / "log" / "debug", "x", Rotation(100, 2))
        file.append([NINE])
        file.close()
    finally:
        os.umask(before)
    made = [tmp_path / "base", tmp_path / "base" / "log", tmp_path / "base" / "log" / "debug"]
    assert [mode(path) for path in made] == [0o750] * 3
    assert mode(made[2] / "x.log") == 0o640


def test_links_are_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "debug").symlink_to(elsewhere)
    with pytest.raises(Refused, match="symbolic link"):
        RotatingFile(tmp_path / "log" / "debug", "x", Rotation(100, 2)).append([NINE])
    (tmp_path / "log" / "x.log").symlink_to(elsewhere / "precious")
    with pytest.raises(Refused):
        RotatingFile(tmp_path / "log", "x", Rotation(100, 2)).append([NINE])
    assert names(elsewhere) == ["precious"] and (elsewhere / "precious").read_text() == "mine"


class Tap:
    """A place that takes as many bytes as it is allowed to."""

    name = "the tap"

    def __init__(self) -> None:
        self.room = 1 << 30
        self.taken: list[bytes] = []

    def append(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines):
            if len(line) > self.room:
                raise Refused("No space left on device", number)
            self.room -= len(line)
            self.taken.append(line)

    def close(self) -> None: ...


def test_F12_lost_lines_are_counted_and_told_once_when_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    tap = Tap()
    sink = Sink(tap)
    sink.write([NINE])
    assert not caplog.records
    tap.room = 10
    for _ in range(3):
        sink.write([NINE, NINE])
    assert sink.lost == 5
    tap.room = 1 << 20
    sink.write([NINE])
    sink.write([NINE])
    assert len(tap.taken) == 4
    bad, good = [record.getMessage() for record in caplog.records]
    assert bad.startswith("the tap cannot be written: No space left on device")
    assert good == "the tap is written again: 5 lines were lost (No space left on device)"


def test_a_place_that_flutters_is_complained_about_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    tap = Tap()
    sink = Sink(tap)
    for _ in range(10):
        tap.room = 0
        sink.write([NINE])
        tap.room = 100
        sink.write([NINE])
    assert sink.lost == 10 and len(caplog.records) == 2


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def fill(stream: StandardStream, line: bytes) -> int:
    """Lines it takes before it refuses."""
    with pytest.raises(Refused, match="nobody reads it") as refused:
        stream.append([line] * 100_000)
    return refused.value.taken


def test_F32_a_pipe_that_nobody_reads_refuses_and_takes_lines_again(pipe: tuple[int, int]) -> None:
    read, write = pipe
    stream = StandardStream(write, "standard error")
    assert os.get_blocking(write), "whoever shares the pipe must not find it changed"
    line = b"x" * 1000 + b"\n"
    taken = fill(stream, line)
    assert taken > 10
    assert os.read(read, 1 << 20).count(b"\n") >= taken - 1
    stream.append([b"again\n"])
    assert os.read(read, 1 << 20).endswith(b"again\n")
    stream.close()
    os.close(read)
    os.close(write)


def test_F32_a_socket_that_nobody_reads_refuses() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = StandardStream(ours.fileno(), "standard error")
        assert fill(stream, b"x" * 1000 + b"\n") > 10
        stream.close()


def test_a_line_that_was_cut_is_ended_before_the_next() -> None:
    read, write = os.pipe()
    stream = StandardStream(write, "standard error")
    fill(stream, b"y" * 999 + b"\n")
    with pytest.raises(Refused):
        stream.append([b"z" * 5000 + b"\n"])
    data = os.read(read, 1 << 20)
    stream.append([b"whole\n"])
    data += os.read(read, 1 << 20)
    assert data.endswith(b"\nwhole\n")
    stream.close()
    os.close(read)
    os.close(write)


def test_F12_a_full_device_is_named() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    stream = StandardStream(fd, "standard error")
    with pytest.raises(Refused, match="No space left on device"):
        stream.append([NINE])
    stream.close()
    os.close(fd)


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    stream = StandardStream(write, "standard error")
    with pytest.raises(Refused, match="Broken pipe"):
        stream.append([NINE])
    stream.close()
    os.close(write)


def test_levels_of_libraries_never_reach_debug() -> None:
    root, before = logging.getLogger(), logging.getLogger().level
    try:
        apply_levels(dict.fromkeys(("llm", "llmmodels", "server"), "DEBUG"), "server")
        assert root.level == logging.INFO and logging.getLogger("server.x").isEnabledFor(logging.DEBUG)
    finally:
        root.setLevel(before)
        for name in ("llm", "llmmodels", "server"):
            logging.getLogger(name).setLevel(logging.NOTSET)
