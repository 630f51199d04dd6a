"""The queue is bounded, nobody waits for it, and every process of a daemon follows the levels."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.logs.places import Sink
from engine.logs.writer import Writer
from tests.harness import REPO, eventually


class Stuck:
    """A disk that does not answer until it is let go."""

    name = "the disk"

    def __init__(self) -> None:
        self.free = threading.Event()
        self.entered = threading.Event()
        self.lines: list[bytes] = []

    def append(self, lines: Sequence[bytes]) -> None:
        self.entered.set()
        assert self.free.wait(30)
        self.lines += lines

    def close(self) -> None: ...


def test_F12_a_disk_that_hangs_holds_up_nobody_and_costs_counted_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = Stuck()
    writer, sink = Writer(lambda: None), Sink(disk)
    writer.start()
    writer.put(sink, b"first\n", urgent=True)
    assert disk.entered.wait(30)
    line = b"x" * 99_999 + b"\n"
    for _ in range(100):  # returns at once, or the test's time is up
        writer.put(sink, line)
    assert 50 < writer.lost < 70, "the queue takes 4 MiB"
    disk.free.set()
    eventually(lambda: len(disk.lines) == 101 - writer.lost, 30.0, "the others are written")
    eventually(lambda: caplog.records, 30.0, "the losses are told")
    (told,) = caplog.records
    assert told.levelno == logging.WARNING and told.getMessage().startswith(f"{writer.lost} lines were lost")
    writer.end(30.0)


def test_the_end_writes_what_is_there_and_waits_for_no_disk() -> None:
    disk = Stuck()
    writer, sink = Writer(lambda: None), Sink(disk)
    writer.start()
    writer.put(sink, b"last words\n")
    writer.end(0.2)
    assert not disk.lines
    disk.free.set()
    writer.end(30.0)
    assert disk.lines == [b"last words\n"]


TWO_PROCESSES = """
import logging, os, sys, time
from engine.logs import room
room.open_logs(os.environ)
log = logging.getLogger("llm.x")
room.set_levels("llm:warn")
down, up = os.pipe(), os.pipe()
if os.fork() == 0:
    room.enter_child("llm", reads_requests=False)
    os.write(up[1], b"u")
    def until(level):
        end = time.monotonic() + 30
        while log.getEffectiveLevel() != level and time.monotonic() < end:
            time.sleep(0.01)
    log.info("not said")
    until(logging.DEBUG)
    log.debug("said at debug")
    os.write(up[1], b"u")
    until(logging.ERROR)
    log.warning("not said either")
    log.error("said at error")
    room.close_logs()
    os._exit(0)
os.read(up[0], 1)
room.set_levels("debug")
os.read(up[0], 1)
room.reset_levels()
os.wait()
log.warning("not said by the parent")
"""


def test_levels_that_change_reach_processes_that_run_and_those_forked_later(tmp_path: Path) -> None:
    environ = {"MINDIE_LOG_PATH": str(tmp_path), "MINDIE_LOG_LEVEL": "error", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES],
        cwd=REPO,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "log" / "debug").iterdir()
    assert file.name.startswith("mindie-llm_")
    assert [line.rpartition(" : ")[2] for line in file.read_text().splitlines()] == [
        "said at debug",
        "[MIE05E000000] said at error",
    ]
    assert "not said" not in done.stderr and "said at debug" in done.stderr
