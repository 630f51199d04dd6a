"""One event is one line, whatever a client has put into it."""

from __future__ import annotations

import io
import logging
import re

import pytest

from daemon.logs import set_up_logging

HEAD = re.compile(r"\[\d{4}-\d\d-\d\d [\d:.]+\] \[\d+\] \[\d+\] \[server\] \[[A-Z]+\] \[[\w.]+-\d+\] : ")
HOSTILE = "a\n[2026-01-01 00:00:00.000] [1] forged\r\x1b[2J\x00\x7f\x9b1m\u2028b\té"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(root, "level", root.level)
    set_up_logging({})
    return stream


def test_control_characters_of_a_message_are_escaped(written: io.StringIO) -> None:
    logging.getLogger("server.x").warning("adapter %s", HOSTILE)
    line = written.getvalue().removesuffix("\n")
    assert HEAD.match(line) and line.endswith("é")
    assert line.isprintable()


def test_a_traceback_begins_no_line_of_its_own(written: io.StringIO) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("server.x").exception("%s failed", HOSTILE)
    first, *others = written.getvalue().removesuffix("\n").split("\n")
    assert HEAD.match(first) and "failed" in first and "ValueError" in "".join(others)
    assert all(line.isprintable() for line in (first, *others))
    assert all(line.startswith("  ") for line in others)
