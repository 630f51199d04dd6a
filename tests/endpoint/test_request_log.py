"""Where the time of a request went: the parts add up, whatever has happened to it."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from endpoint.flights import Flight, Part, Token
from endpoint.generation_stream import GenerationStream
from endpoint.request_log import Breakdown, RequestRecord, server_timing, timing_comment
from engine.outcome import FinishCode
from engine.sampling_params import SamplingParams

PARTS = ("queued_ms", "prepared_ms", "prefill_ms", "decode_ms", "preempted_ms", "written_ms")


def record(
    monkeypatch: pytest.MonkeyPatch,
    *,
    end: float,
    opened: float | None = None,
    admitted: float | None = None,
    submitted: float | None = None,
    first: float | None = None,
    last: float = 0.0,
    wait_s: float = 0.0,
    preempted_s: float = 0.0,
) -> Breakdown:
    """Of a request that came at 100 s; all times are seconds after that."""
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    made = RequestRecord("id", "id", "/x")
    made.opened = None if opened is None else 100.0 + opened
    made.admitted = None if admitted is None else 100.0 + admitted
    if submitted is not None:
        flight = Flight(1, 100.0, 100.0 + submitted, 100.0 + last, math.inf)
        part = Part(flight, 0, np.ones(7, np.int32), SamplingParams(8), 5, [[]])
        flight.note_preemptions(part, 2, int(preempted_s * 1e6))
        token = (
            None
            if first is None
            else Token(0, 1, FinishCode.NONE, 1, int(wait_s * 1e6), 100.0 + first, 0.0, ())
        )
        stream = SimpleNamespace(
            flight=flight, first=token, context=SimpleNamespace(prompt_tokens=7), output_tokens=3
        )
        made.stream = cast(GenerationStream, stream)
    monkeypatch.setattr("time.monotonic", lambda: 100.0 + end)
    return made.breakdown()


def parts(told: Breakdown) -> list[float]:
    values = asdict(told)
    assert sum(values[name] for name in PARTS) == pytest.approx(told.total_ms)
    assert min(values[name] for name in PARTS) >= 0
    return [round(values[name]) for name in PARTS]


def test_a_whole_life(monkeypatch: pytest.MonkeyPatch) -> None:
    told = record(
        monkeypatch, opened=1, admitted=3, submitted=4, first=9, last=20, end=22, wait_s=2, preempted_s=6
    )
    assert parts(told) == [2000 + 2000, 1000 + 1000, 3000, 5000, 6000, 2000]
    assert (told.prompt_tokens, told.output_tokens, told.preemptions, told.total_ms) == (7, 3, 2, 22000)


@pytest.mark.parametrize(
    ("milestones", "expected"),
    [
        ({}, [0, 5000, 0, 0, 0, 0]),  # the body was wrong
        ({"opened": 1}, [4000, 1000, 0, 0, 0, 0]),  # refused while it stood in line
        ({"opened": 1, "admitted": 2}, [1000, 4000, 0, 0, 0, 0]),  # while it was tokenized
        ({"opened": 1, "admitted": 2, "submitted": 3}, [3000, 2000, 0, 0, 0, 0]),  # before any token
    ],
)
def test_a_life_cut_short(
    monkeypatch: pytest.MonkeyPatch, milestones: dict[str, float], expected: list[float]
) -> None:
    assert parts(record(monkeypatch, end=5, **milestones)) == expected


def test_waits_that_overlap_never_make_a_part_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several prompts in one request each has its own waits."""
    told = record(
        monkeypatch, opened=0, admitted=0, submitted=0, first=1, last=3, end=4, wait_s=9, preempted_s=9
    )
    assert parts(told) == [1000, 0, 0, 0, 2000, 1000]


def test_how_a_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = record(monkeypatch, opened=0, admitted=0, submitted=0, first=1, last=3, end=4)
    header = server_timing(told)["Server-Timing"]
    assert "prefill;dur=1000.0, decode;dur=2000.0" in header and 'output_tokens;desc="3"' in header
    comment = timing_comment(told)
    assert comment.startswith(b": timings {") and comment.endswith(b"}\n\n") and comment.count(b"\n") == 2


def test_preemptions_in_several_instances_add_up() -> None:
    """Where a request goes on after a death, the engine counts from 0 again."""
    flight = Flight(1, 0.0, 0.0, 0.0, math.inf)
    part = Part(flight, 0, np.ones(7, np.int32), SamplingParams(8), 5, [[]])
    for count, wait_us in ((0, 1), (1, 10), (1, 1), (3, 100), (0, 1), (1, 1000)):
        flight.note_preemptions(part, count, wait_us)
    assert (flight.preemptions, flight.preempted_us) == (4, 1110)
