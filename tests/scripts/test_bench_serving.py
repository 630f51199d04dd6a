"""The load generator: how answers are taken apart, and whole runs against fake servers of known behaviour."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_serving.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_serving", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


bench = _load()

# --- recorded bytes ------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def text_frame(text: str, finish: str | None = None, **extra: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "stop_reason": None, "finish_reason": finish}
    body = {
        "id": "endpoint_common_1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }
    return b"data: " + json.dumps(body | extra, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "batch_size": [1] * completion,
        "queue_wait_time": [7] * completion,
    }


def totals_frame(prompt: int, completion: int) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": usage(prompt, completion)}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def timed(*pieces: bytes) -> list[tuple[float, bytes]]:
    """One read per piece, a second apart."""
    return [(float(index), piece) for index, piece in enumerate(pieces)]


def one_chunk(frame: bytes) -> bytes:
    return chunked(frame)[: -len(b"0\r\n\r\n")]


def test_times_belong_to_the_frames() -> None:
    reads = timed(
        HEAD,
        one_chunk(text_frame("")),  # half a character: no text yet
        one_chunk(text_frame(" a")),
        one_chunk(text_frame(" b")),
        one_chunk(text_frame("", "length")) + one_chunk(totals_frame(9, 4)) + chunked(DONE),
    )
    answer = bench.read_answer(0.5, reads)
    assert answer.error is None
    assert answer.frames == [1.0, 2.0, 3.0, 4.0]
    assert answer.first == 2.0
    assert (answer.prompt_tokens, answer.completion_tokens, answer.tokens) == (9, 4, 4)


BODY = [
    text_frame("a\n\ndata: {"),
    text_frame(' "text": "x" \r\n0\r\n\r\n'),
    text_frame("é你🎉"),
    text_frame("!", "length", usage=usage(3, 4)),
    DONE,
]


@given(st.lists(st.integers(0, 2000), max_size=12), st.lists(st.integers(0, 2000), max_size=12))
@settings(deadline=None)
def test_cuts_change_nothing(reads_at: list[int], chunks_at: list[int]) -> None:
    """However the body is cut into HTTP chunks, and the bytes into reads."""
    raw = HEAD + chunked(*cut(b"".join(BODY), chunks_at))
    answer = bench.read_answer(0.0, timed(*cut(raw, reads_at)))
    assert answer.error is None
    assert len(answer.frames) == 4
    assert answer.frames == sorted(answer.frames)
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 4)


@given(st.lists(st.integers(0, 2000), max_size=12))
@settings(deadline=None)
def test_connection_knows_the_end_of_an_answer(reads_at: list[int]) -> None:
    """Not before the last byte, whatever the text looks like, and then at once."""

    async def run() -> None:
        connection = bench.Connection()
        connection._transport = SimpleNamespace(write=lambda request: None)
        task = asyncio.create_task(connection.exchange(b""))
        await asyncio.sleep(0)
        pieces = cut(HEAD + chunked(*BODY), reads_at)
        for piece in pieces:
            assert not connection._answered.done()
            connection.data_received(piece)
        _, reads = await asyncio.wait_for(task, 5)
        assert b"".join(data for _, data in reads) == b"".join(pieces)

    asyncio.run(run())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def test_other_servers_spellings() -> None:
    """Spaces in the JSON, carriage returns, no chunking, comments, text and finish in one frame, no usage."""
    lines = ': ping\r\n\r\ndata: {"choices": [{"text": " a", "index": 0}]}\r\n\r\n'
    last = 'data:{"choices": [{"text": "b", "finish_reason": "length"}], "usage": null}\r\n\r\n'
    last += "data: [DONE]\r\n\r\n"
    answer = bench.read_answer(0.0, timed(b"HTTP/1.1 200 OK\r\n\r\n", lines.encode(), last.encode()))
    assert answer.error is None
    assert answer.frames == [1.0, 2.0]
    assert answer.completion_tokens is None
    assert answer.tokens == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "closed before"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}", "HTTP 503: {}"),
        (HEAD + chunked(text_frame(" a")), "ended early"),
        (HEAD + one_chunk(text_frame(" a")), "ended early"),
        (HEAD + chunked(DONE), "no text"),
        (HEAD + chunked(text_frame(" a"), b'data: {"error":"engine","error_type":"x"}\n\n', DONE), "engine"),
        (HEAD + b"zz\r\n", "invalid literal"),
    ],
)
def test_broken_answers_are_failures(raw: bytes, message: str) -> None:
    answer = bench.read_answer(0.0, timed(raw) if raw else [])
    assert answer.error is not None
    assert message in answer.error


# --- figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "value"), [(0, 1.0), (50, 2.5), (90, 3.7), (100, 4.0)])
def test_percentile(share: float, value: float) -> None:
    assert bench.percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(value)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100), st.floats(0, 100))
def test_percentile_rises_within_the_values(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert min(values) <= bench.percentile(values, low) <= bench.percentile(values, high) <= max(values)


def test_summary_of_known_times() -> None:
    answers = [
        bench.Answer(0.0, [1.0, 1.5, 2.0], 1.0, 3, 10),
        bench.Answer(1.0, [3.0, 4.0], 3.0, 2, 20),
        bench.Answer(0.0, error="HTTP 503"),
    ]
    cpu = {"client": 0.1, "endpoint": 0.2, "workers": 1.0, "others": 0.5}
    figures = bench.summarize(answers, 4.0, cpu, input_len=99, output_len=3)
    assert (figures["requests"], figures["failed"], figures["short"]) == (3, 1, 1)
    assert figures["output_tokens"] == 5
    assert figures["output_tok_s"] == pytest.approx(5 / 4)
    assert figures["total_tok_s"] == pytest.approx(35 / 4)
    assert figures["req_s"] == pytest.approx(2 / 4)
    assert figures["ttft_ms_p50"] == pytest.approx(1500)
    assert figures["tpot_ms_p50"] == pytest.approx(750)  # 500 and 1000
    assert figures["itl_ms_p50"] == pytest.approx(500)  # 500, 500, 1000
    assert figures["e2e_ms_p99"] == pytest.approx(2990)  # 2000 and 3000
    assert figures["endpoint_us_per_token"] == pytest.approx(40_000)
    assert figures["other_cores"] == pytest.approx(0.125)


def test_summary_of_failures_only() -> None:
    figures = bench.summarize([bench.Answer(0.0, error="x")], 1.0, {"client": 0.1}, 4, 4)
    assert (figures["failed"], figures["output_tok_s"]) == (1, 0)
    assert "ttft_ms_p50" not in figures
    assert bench.spread([figures], "output_tok_s") == 0.0
    assert "TTFT" not in bench.table({1: figures})


def test_medians_and_spread() -> None:
    repeats = [{"a": 1.0, "b": 5.0}, {"a": 4.0}, {"a": 2.0, "b": 7.0}]
    assert bench.medians(repeats) == {"a": 2.0}
    assert bench.spread(repeats, "a") == pytest.approx(1.5)


def test_table_has_a_column_per_level() -> None:
    text = bench.table(
        {1: {"requests": 2, "output_tok_s": 10.04}, 32: {"requests": 64, "output_tok_s": 1234.5}}
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines == [
        ["concurrency", "1", "32"],
        ["requests", "2", "64"],
        ["output", "tok/s", "10.0", "1,234.5"],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1


# --- prompts -------------------------------------------------------------------------------------------


def test_prompts_differ_and_follow_the_seed() -> None:
    def first(seed: int) -> list[list[int]]:
        source = bench.random_prompts(range(100, 2000), 32, seed)
        return [next(source) for _ in range(50)]

    prompts = first(1)
    assert len({tuple(prompt) for prompt in prompts}) == 50
    assert all(len(prompt) == 32 and min(prompt) >= 100 and max(prompt) < 2000 for prompt in prompts)
    assert prompts == first(1)
    assert prompts != first(2)


def test_usable_ids_leave_special_tokens_out(tmp_path: Path) -> None:
    document = {"model": {"vocab": {"a": 0, "b": 1, "c": 2, "d": 3}}, "added_tokens": [{"id": 1}, {"id": 4}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert list(bench.usable_ids(tmp_path, None)) == [0, 2, 3]
    assert list(bench.usable_ids(tmp_path, 3)) == [0, 2]
    ids = bench.usable_ids(None, 160)
    assert min(ids) > 0 and max(ids) < 159 and len(ids) > 120


def test_plain_sends_standard_fields_only() -> None:
    options = {"output_len": 7, "plain": True, "no_usage": True}
    body = bench.request_body("m", [1, 2], argparse.Namespace(**options))
    assert set(body) == {"model", "prompt", "max_tokens", "temperature", "stream"}
    body = bench.request_body(
        "m", [1, 2], argparse.Namespace(**options | {"plain": False, "no_usage": False})
    )
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


# --- processor time ------------------------------------------------------------------------------------


@dataclass
class FakeProcess:
    seconds: float
    listening: bool = False
    below: list[FakeProcess] = field(default_factory=list)

    def children(self, recursive: bool) -> list[FakeProcess]:
        return self.below

    def net_connections(self, kind: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(status="LISTEN" if self.listening else "ESTABLISHED")]

    def cpu_times(self) -> SimpleNamespace:
        return SimpleNamespace(user=self.seconds / 2, system=self.seconds / 2)


@pytest.mark.parametrize("named", [None, 11])
def test_every_process_is_counted_once(monkeypatch: pytest.MonkeyPatch, named: int | None) -> None:
    endpoint, first, second = FakeProcess(2.0, named is None), FakeProcess(8.0), FakeProcess(16.0)
    processes = {None: FakeProcess(1.0), 10: FakeProcess(4.0, below=[endpoint, first, second]), 11: endpoint}
    monkeypatch.setattr(bench.psutil, "Process", lambda pid=None: processes[pid])

    @dataclass
    class Total:
        idle: float = 100.0
        user: float = 50.0

        def __iter__(self) -> Iterator[float]:
            return iter((self.idle, self.user))

    monkeypatch.setattr(bench.psutil, "cpu_times", Total)
    assert bench.CpuMeter(10, named).read() == {
        "client": 1.0, "daemon": 4.0, "endpoint": 2.0, "workers": 24.0, "others": 19.0,
    }  # fmt: skip


def test_own_time_is_known_without_any_pid() -> None:
    meter = bench.CpuMeter(None, None)
    before = meter.read()
    assert set(before) == {"client"}
    deadline = sum(os.times()[:2]) + 0.05
    while sum(os.times()[:2]) < deadline:
        pass
    assert meter.read()["client"] >= before["client"] + 0.03


# --- whole runs ----------------------------------------------------------------------------------------


@dataclass
class FakeServer:
    """Speaks the completion stream of the API; counts what it is asked."""

    close_after_answer: bool = False
    fail_every: int = 0  # each n-th request is refused
    hangs: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    url: str = ""

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake"}, {"id": "other"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fail_every and len(self.bodies) % self.fail_every == 0:
            return web.json_response({"error": "full", "error_type": "overloaded"}, status=503)
        if self.hangs:
            await asyncio.Event().wait()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.close_after_answer:
            response.force_close()
        await response.prepare(request)
        count = body["max_tokens"]
        for index in range(count):
            await asyncio.sleep(0.001)
            await response.write(text_frame(f" w{index}", "length" if index == count - 1 else None))
        if "stream_options" in body:
            await response.write(totals_frame(len(body["prompt"]), count))
        await response.write(DONE)
        self.open -= 1
        return response


@contextmanager
def serve(server: FakeServer) -> Iterator[FakeServer]:
    """In a thread of its own, because the script runs event loops itself."""
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.completions)
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app, shutdown_timeout=0.1)  # one handler never ends
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runner = loop.run_until_complete(start())
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve(FakeServer()) as started:
        yield started


OPTIONS = ["--vocab-size", "2048", "--input-len", "16", "--output-len", "5"]


def test_run_counts_everything(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    argv = ["--url", server.url, *OPTIONS, "--concurrency", "1,3", "--repeats", "2", "--json", str(out)]
    assert bench.main(argv) == 0

    assert len(server.bodies) == 1 + 2 * (2 + 6)
    assert server.most_open == 3
    assert {body["model"] for body in server.bodies} == {"fake"}
    assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies)
    assert all(body["ignore_eos"] and body["stream"] and body["max_tokens"] == 5 for body in server.bodies)

    report = json.loads(out.read_text())
    assert report["environment"]["model"] == "fake"
    assert "--concurrency 1,3" in report["environment"]["command"]
    for level, requests in (("1", 2), ("3", 6)):
        assert len(report["levels"][level]["repeats"]) == 2
        for figures in report["levels"][level]["repeats"]:
            assert (figures["requests"], figures["failed"], figures["short"]) == (requests, 0, 0)
            assert figures["output_tokens"] == 5 * requests
            assert figures["output_tok_s"] * figures["wall_s"] == pytest.approx(5 * requests)
            assert figures["total_tok_s"] * figures["wall_s"] == pytest.approx(21 * requests)
            # the server sleeps a millisecond before each of five frames
            assert figures["ttft_ms_p50"] >= 1
            assert figures["e2e_ms_p50"] >= 5
            assert 0 < figures["tpot_ms_p50"] <= figures["e2e_ms_p99"]
            assert figures["ttft_ms_p99"] <= figures["e2e_ms_p99"] <= figures["wall_s"] * 1e3
    shown = capsys.readouterr().out
    assert "concurrency" in shown
    assert "TTFT ms p50" in shown


def test_connections_that_close_are_opened_again(tmp_path: Path) -> None:
    with serve(FakeServer(close_after_answer=True)) as server:
        argv = ["--url", server.url, *OPTIONS, "--concurrency", "2", "--repeats", "1", "--requests", "6"]
        assert bench.main(argv) == 0
        assert len(server.bodies) == 7


def test_failures_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    with serve(FakeServer(fail_every=4)) as server:
        argv = ["--url", server.url, *OPTIONS, "--concurrency", "2", "--repeats", "1", "--requests", "7"]
        assert bench.main([*argv, "--json", str(out)]) == 1
    figures = json.loads(out.read_text())["levels"]["2"]["median"]
    assert figures["failed"] == 2
    assert figures["output_tokens"] == 25
    assert "HTTP 503" in capsys.readouterr().err


def test_tokens_are_frames_without_usage(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--url", server.url, *OPTIONS, "--concurrency", "1", "--repeats", "1", "--no-usage", "--plain"]
    assert bench.main(argv) == 0
    assert "tokens are frames" in capsys.readouterr().out
    assert "ignore_eos" not in server.bodies[0]


def test_text_prompts_come_from_a_file(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo two\n")
    argv = [
        "--url",
        server.url,
        "--prompt-file",
        str(tmp_path / "prompts.txt"),
        "--output-len",
        "2",
        "--warmup",
        "0",
    ]
    assert bench.main([*argv, "--concurrency", "1", "--repeats", "1", "--requests", "3"]) == 0
    assert [body["prompt"] for body in server.bodies] == ["one", "two two", "one"]


def test_an_answer_that_never_ends_is_a_failure() -> None:
    with serve(FakeServer(hangs=True)) as server:
        target = bench.Target(bench.urlsplit(server.url), None, 0.05)
        requests = [target.request({"prompt": "x"})] * 3
        _, answers = asyncio.run(bench.run_load(target, requests, 2, ""))
    assert all("TimeoutError" in answer.error for answer in answers)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--url", "http://127.0.0.1:9", *OPTIONS]) == 2
    assert "cannot measure" in capsys.readouterr().err


def test_prompts_need_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--vocab-size" in capsys.readouterr().err
