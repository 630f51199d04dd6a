"""Soak and chaos: their requests are what their seed says, every request ends once, and growth is seen."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
fuzz = importlib.import_module("fuzz_bodies")
ledgers = importlib.import_module("ledger")
requests = importlib.import_module("traffic_requests")
traffic = importlib.import_module("traffic")
soak = importlib.import_module("soak")
chaos = importlib.import_module("chaos")
footprint = importlib.import_module("footprint")

Fate, Manner = ledgers.Fate, ledgers.Manner
ERROR = json.dumps({"error": "no", "error_type": "T", "type": "T"}).encode()
SSE = {"content-type": "text/event-stream"}
MIB = 2**20


def asks(seed: int, count: int = 200) -> list[Any]:
    rng = random.Random(seed)
    return [requests.make_ask(rng) for _ in range(count)]


def test_a_seed_is_always_the_same_requests_in_all_dialects() -> None:
    assert asks(1) == asks(1) != asks(2)
    assert {ask.dialect for ask in asks(1)} == {"chat", "completions", "vllm", "tgi", "triton", "native"}
    assert {ask.stream for ask in asks(1)} == {True, False}


# --- the end of a request ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "whole", "headers", "fate"),
    [
        (200, b'{"a": 1}', True, {}, Fate.FINISHED),
        (200, b'data: {"a": 1}\n\ndata: [DONE]\n\n', True, SSE, Fate.FINISHED),
        (200, b'data: {"a": 1}\n\n', True, SSE, Fate.LOST),
        (200, b'data: {"a": 1}\n\ndata: [DONE]\n\n', False, SSE, Fate.LOST),
        (200, b'data: {"error": "x"}\n\ndata: [DONE]\n\n', True, SSE, Fate.ERROR),
        (200, b'data: {"error": "x"}\n\n', True, SSE, Fate.LOST),
        (422, ERROR, True, {}, Fate.REFUSED),
        (422, b"<html>", True, {}, Fate.LOST),
        (503, ERROR, True, {}, Fate.REFUSED),
        (500, ERROR, True, {}, Fate.ERROR),
    ],
)
def test_every_answer_has_one_fate(status: int, body: bytes, whole: bool, headers: Any, fate: Any) -> None:
    assert traffic.judge("/v1/completions", fuzz.Answer(status, headers, body, whole, False))[0] is fate


def test_no_answer_is_a_lost_request() -> None:
    assert traffic.judge("/v1/completions", None)[0] is Fate.LOST


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"choices": [{"text": "ab"}]}', {}),
        (b'{"choices": [{"message": {"content": "ab"}}]}', {}),
        (b'{"text": ["ab"]}', {}),
        (b'{"generated_text": "ab"}', {}),
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
         b'data: {"choices": [{"delta": {"content": "b"}}]}\n\ndata: [DONE]\n\n', SSE),
        (b'data:{"text_output": "a"}\n\ndata:{"text_output": "b"}\n\n', SSE),
        (b'{"text": ["a"]}\0{"text": ["b"]}\0', SSE),
        (b'data: {"token": {"text": "a"}, "generated_text": null}\n\n'
         b'data: {"token": {"text": "b"}, "generated_text": "ab"}\n\n', SSE),
    ],
)  # fmt: skip
def test_the_text_of_every_dialect_is_found(body: bytes, headers: Any) -> None:
    assert traffic.text_of(fuzz.Answer(200, headers, body, True, False)) == "ab"


def ending(
    fate: Any, *, sent: float = 0.0, ended: float = 1.0, manner: Any = Manner.READS, **more: Any
) -> Any:
    return ledgers.Ending(manner, "chat", fate, "", sent, sent, ended, **more)


def counters(received: int, success: int, failed: int, cancelled: int = 0) -> dict[str, float]:
    values = {
        "request_received": received,
        "request_success": success,
        "request_failed": failed,
        "mindie_request_cancelled": cancelled,
    }
    return {f"{name}_total": float(value) for name, value in values.items()}


def test_the_servers_counters_are_held_against_the_ledger() -> None:
    before = counters(5, 5, 0)
    ledger = ledgers.Ledger(3, [ending(Fate.FINISHED), ending(Fate.FINISHED), ending(Fate.REFUSED)])
    assert ledgers.disagreements(ledger, before, counters(8, 7, 1)) == []
    assert len(ledgers.disagreements(ledger, before, counters(8, 7, 0))) == 1  # one of its own is open
    assert len(ledgers.disagreements(ledger, before, counters(7, 6, 1))) == 2
    assert len(ledgers.disagreements(ledger, before, counters(9, 8, 1))) == 2
    assert len(ledgers.disagreements(ledger, before, counters(8, 6, 1, 1))) == 2  # nobody hung up
    ledger = ledgers.Ledger(1, [ending(Fate.CANCELLED, manner=Manner.HANGS_UP)])
    assert ledgers.disagreements(ledger, before, counters(6, 6, 0)) == []  # it was finished before we hung up
    assert ledgers.disagreements(ledger, before, counters(6, 5, 0, 1)) == []


# --- slopes --------------------------------------------------------------------------------------------


def test_a_slope_is_found_in_noise_and_outliers_do_not_make_one() -> None:
    rng = random.Random(0)
    times = [10.0 * step for step in range(200)]
    flat = [100 + rng.gauss(0, 0.5) for _ in times]
    flat[50] = 500
    still = soak.theil_sen(times, flat)
    assert still.low < 0 < still.high
    grown = soak.theil_sen(times, [value + 5 * when / 3600 for value, when in zip(flat, times, strict=True)])
    assert grown.low < 5 < grown.high
    assert grown.low > 0
    assert math.isnan(soak.theil_sen([1.0], [2.0]).estimate)


def soaked(
    rss: list[int], descriptors: tuple[int, int] = (9, 9), endings: Any = (), rings: int = 0
) -> list[str]:
    samples = soak.Samples()
    for step, value in enumerate(rss):
        samples.times_s.append(10.0 * step)
        shared = step * rings
        samples.taken.append({"endpoint": footprint.Footprint(value + shared, value, shared, 9, 1)})
        samples.shm.append(0)
    idle = [{"endpoint": footprint.Footprint(1, 1, 0, count, 1)} for count in descriptors]
    ledger = ledgers.Ledger(len(endings), list(endings))
    run = soak.Run(10, 5, 0.0, 0.0, 10.0 * len(rss), ledger, samples, idle[0], idle[1], [])
    found: list[str] = soak.findings(run, 1.0)
    return found


def test_a_soak_fails_for_growth_and_for_what_was_lost() -> None:
    level = [100 * MIB] * 30
    assert soaked(level) == []
    assert soaked(level, rings=MIB // 10) == []  # allocated at the start
    assert "grows by" in soaked([value + step * MIB // 10 for step, value in enumerate(level)])[0]
    assert "descriptors more" in soaked(level, (9, 20))[0]
    assert "lost: chat" in soaked(level, endings=[ending(Fate.LOST)])[0]


# --- what became of a request --------------------------------------------------------------------------


def broken(endings: list[Any], fault: str, at: float = 0.5, served: float | None = 2.0) -> list[str]:
    happened = [chaos.Happened(chaos.FAULTS[fault], at, not_ready=at, served=served)]
    ledger = ledgers.Ledger(len(endings), endings)
    found: list[str] = chaos.findings(chaos.Run(1.0, ledger, happened, TEXTS, [], True))
    return found


ASK = requests.Ask("chat", "/", "{}", True)
TEXTS = {ASK: "as always"}


def test_a_chaos_run_fails_for_cuts_and_other_texts_only() -> None:
    assert broken([ending(Fate.FINISHED, ask=ASK, text="as always"), ending(Fate.ERROR)], "worker-kill") == []
    assert "another text" in broken([ending(Fate.FINISHED, ask=ASK, text="as")], "worker-kill")[0]
    assert len(broken([ending(Fate.LOST)], "worker-kill")) == 2  # it was cut, and the ledger does not add up
    assert broken([ending(Fate.LOST)], "endpoint-kill") == []  # it went down with its endpoint
    assert len(broken([ending(Fate.LOST, sent=3.0, ended=4.0)], "endpoint-kill")) == 2
    assert "not served again" in broken([], "worker-kill", served=None)[0]


# --- the real thing ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_SETTLES_S", 0.5)
    argv = "--mock --minutes 0.05 --warm-up 0 --calibrate 1 --interval 0.5 --most-mib-per-hour 1e9"
    assert soak.main(argv.split()) == 0
    out = capsys.readouterr().out
    assert "nothing lost, nothing grew" in out
    for role in ("parent", "endpoint", "worker 0"):
        assert f"| {role} |" in out


@pytest.mark.slow
def test_a_short_chaos(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "QUIET_S", (0.2, 0.5))
    argv = "--mock --measure 1 --calibrate 1 --faults worker-pause,half-open"
    assert chaos.main(argv.split()) == 0
    out = capsys.readouterr().out
    assert "| worker-pause | 1 | - |" in out
    assert "every request ended in one way" in out
