"""The fuzzer: its requests are what their number says, and it sees what is wrong with an answer."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
cases = importlib.import_module("fuzz_cases")
fuzz = importlib.import_module("fuzz_bodies")

ERROR = json.dumps({"error": "no", "error_type": "T", "type": "T"}).encode()
SSE = {"content-type": "text/event-stream"}
NUMBERS = range(400)


# --- requests ------------------------------------------------------------------------------------------


def test_a_number_is_always_the_same_request() -> None:
    for dialect in cases.GOOD:
        assert [cases.make_case(dialect, n) for n in range(30)] == [
            cases.make_case(dialect, n) for n in range(30)
        ]
    assert cases.make_case("chat", 1, seed=1).message != cases.make_case("chat", 1, seed=2).message


def test_requests_are_spoilt_in_many_ways_and_leave_the_good_ones_alone() -> None:
    before = json.dumps(cases.GOOD)
    made = [cases.make_case(dialect, number) for dialect in cases.GOOD for number in NUMBERS]
    assert json.dumps(cases.GOOD) == before
    assert len({case.message for case in made}) > 0.8 * len(made)
    for part in (b"\xff", b"NaN", b"1e400", b"\\ud800", b"[[[[", b"chunked", b"HTTP/1.0", b"Expect", b"\x00"):
        assert any(part in case.message for case in made), part
    assert {case.framed for case in made} == {True, False}


def test_raw_bytes_and_repeated_names_are_written_as_they_are() -> None:
    tree = {"a": [cases.Raw(b"NaN"), "\ud800é"], "b": cases.Pairs([("x", 1), ("x", None)])}
    assert cases.dump(tree) == b'{"a":[NaN,"\xed\xa0\x80\xc3\xa9"],"b":{"x":1,"x":null}}'


# --- answers -------------------------------------------------------------------------------------------


def judged(status: int, body: bytes, path: str = "/v1/completions", **more: Any) -> list[str]:
    case = cases.Case("completions", 0, path, b"", **more.pop("case", {}))
    answer = fuzz.Answer(status, more.pop("headers", {}), body, more.pop("whole", True), False)
    found: list[str] = fuzz.faults(case, answer)
    return found


def test_proper_answers_have_no_faults() -> None:
    assert judged(200, b'{"a": 1}') == []
    assert judged(422, ERROR) == []
    frames = b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    assert judged(200, frames, headers=SSE) == []
    assert judged(200, b'data:{"a": 1}\n\n', "/infer", headers=SSE) == []
    assert judged(200, b'{"text": [""]}\0{"text": ["a"]}\0', "/generate", headers=SSE) == []
    broken = cases.Case("chat", 0, "/", b"", framed=False)
    assert fuzz.faults(broken, None) == []


@pytest.mark.parametrize(
    ("status", "body", "more"),
    [
        (500, ERROR, {}),
        (503, ERROR, {}),
        (302, ERROR, {}),
        (422, b"no", {}),
        (422, b"[]", {}),
        (422, b'{"error": {"message": "x"}, "error_type": "T", "type": "T"}', {}),
        (422, b'{"error": "", "error_type": "T", "type": "T"}', {}),
        (422, b'{"error": "x", "error_type": "T", "type": "U"}', {}),
        (404, b"<html>", {}),
        (200, b'{"a": NaN}', {}),
        (200, b'{"a": "\\ud800"}', {}),
        (200, b'{"a": "\xff"}', {}),
        (200, b'{"a": 1', {}),
        (200, b"{}", {"whole": False}),
        (200, b'data: {"a": 1}\n\n', {"headers": SSE}),
        (200, b"data: [DONE]\n\n", {"headers": SSE}),
        (200, b'data: [DONE]\n\ndata: {"a": 1}\n\ndata: [DONE]\n\n', {"headers": SSE}),
        (200, b'data: {"a": 1}\n\ndata: [DONE]\n', {"headers": SSE}),
        (200, b'data: {"a":\n1}\n\ndata: [DONE]\n\n', {"headers": SSE}),
        (200, b'data: {"error": "x"}\n\ndata: [DONE]\n\n', {"headers": SSE}),
        (200, b'{"text": [""]}', {"headers": SSE, "path": "/generate"}),
        (200, b'{"text": [""]}\0{\0', {"headers": SSE, "path": "/generate"}),
    ],
)
def test_faults_are_seen(status: int, body: bytes, more: dict[str, Any]) -> None:
    assert judged(status, body, **more) != []


def test_no_answer_is_a_fault_when_one_was_owed() -> None:
    assert fuzz.faults(cases.Case("chat", 0, "/", b""), None) != []


@pytest.mark.parametrize(
    ("raw", "body", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", b"ab", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            b"abc",
            True,
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", b"ab", False),
        (b"HTTP/1.0 200 OK\r\n\r\nab", b"ab", True),
    ],
)
def test_answers_are_read_to_their_end(raw: bytes, body: bytes, whole: bool) -> None:
    async def read() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        return await fuzz.read_answer(reader)

    answer = asyncio.run(read())
    assert (answer.status, answer.body, answer.whole) == (200, body, whole)


def test_growth_is_seen() -> None:
    before = fuzz.Footprint(100 << 20, 30)
    assert before.growth(fuzz.Footprint(101 << 20, 31)) == []
    assert len(before.growth(fuzz.Footprint(900 << 20, 300))) == 2
