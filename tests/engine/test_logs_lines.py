"""One event is one line, whatever a client has put into it."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from engine.logs.codes import PARTS, code
from engine.logs.lines import LineFormatter, audit_line, timestamp

TIME = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\]"
VERBOSE = re.compile(TIME + r" \[\d+\] \[\d+\] \[server\] \[(\w+)\] \[there\.py-7\] : (.*)", re.DOTALL)
SIMPLE = re.compile(TIME + r" : \[(\w+)\] (.*)", re.DOTALL)
HOSTILE = "a\n[2026-01-01 00:00:00.000] [1] forged\r\x1b[2J\x00\x7f\x9b1m\u2028b\té"


def record(
    message: str, *args: object, level: int = logging.INFO, name: str = "server.http", **more: object
) -> logging.LogRecord:
    made = logging.getLogger(name).makeRecord(name, level, "/x/there.py", 7, message, args, None)
    vars(made).update(more)
    return made


def line(made: logging.LogRecord, *, verbose: bool = True, quotes: bool = True) -> str:
    return LineFormatter("server", verbose=verbose, quotes_exceptions=quotes).format(made)


def body(text: str, form: re.Pattern[str] = VERBOSE) -> str:
    found = form.fullmatch(text)
    assert found, text
    return found[2]


def test_both_forms() -> None:
    assert body(line(record("%d frames", 3))) == "3 frames"
    assert body(line(record("%d frames", 3), verbose=False), SIMPLE) == "3 frames"


@pytest.mark.parametrize(
    ("level", "name", "more", "expected"),
    [
        (logging.INFO, "server.http", code(2), ""),
        (logging.WARNING, "server.http", {}, "[MIE04W050000] "),
        (logging.ERROR, "server.http", code(2), "[MIE04E050002] "),
        (logging.CRITICAL, "server.unheard", {}, "[MIE04E000000] "),
    ],
)
def test_error_codes_from_warnings_on(level: int, name: str, more: dict[str, object], expected: str) -> None:
    assert body(line(record("x", level=level, name=name, **more))) == f"{expected}x"


def test_the_component_is_the_loggers_or_the_processs() -> None:
    assert "[llmmodels] [ERROR]" in line(record("x", name="llmmodels.runner", level=logging.ERROR))
    assert "[MIE06E010000]" in line(record("x", name="llmmodels.runner", level=logging.ERROR))
    assert "[server] [INFO]" in line(record("x", name="asyncio"))


def test_no_two_parts_share_a_code() -> None:
    codes = [(name.partition(".")[0], digits) for name, digits in PARTS.items()]
    assert len(codes) == len(set(codes)) and "00" not in PARTS.values()


def test_control_characters_of_a_message_are_escaped() -> None:
    text = line(record("adapter %s", HOSTILE))
    assert text.isprintable() and text.endswith("é")
    audit = audit_line("root", "127.0.0.1:1", HOSTILE, "200")
    assert audit.isprintable() and re.fullmatch(
        TIME + r" \[root\] \[127.0.0.1:1\] \[server\] \[.*\] \[200\]", audit
    )


def failed(quotes: bool) -> list[str]:
    try:
        try:
            raise KeyError(HOSTILE)
        except KeyError as error:
            raise ValueError(HOSTILE) from error
    except ValueError:
        made = record("%s failed", HOSTILE, level=logging.ERROR, exc_info=sys.exc_info())
    return line(made, quotes=quotes).split("\n")


def test_a_traceback_begins_no_line_of_its_own() -> None:
    first, *others = failed(quotes=True)
    assert "failed" in first and "ValueError: a" in "".join(others)
    assert all(each.isprintable() for each in (first, *others))
    assert all(each.startswith("  ") for each in others)


def test_P10_where_requests_are_read_a_traceback_does_not_quote_the_exception() -> None:
    _, *others = failed(quotes=False)
    text = "\n".join(others)
    assert "KeyError" in text and "ValueError" in text and "in failed" in text
    assert "forged" not in text


def test_a_message_whose_arguments_do_not_fit_is_written_all_the_same() -> None:
    assert body(line(record("%d frames", "three"))) == "%d frames (its arguments do not fit)"


def test_times_have_milliseconds() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:59\.250", timestamp(59.25))
