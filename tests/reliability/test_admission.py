"""Overload on a running daemon: refused at once and with a time to come back, everybody else served."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import TINY_MODEL, Answer, Daemon, Installation, Json, eventually, merge, model_config
from tests.streams import Reading, take_refused

MakeDaemon = Callable[..., Daemon]

NAME = "mindie-tiny"
MODEL = f"/v2/models/{NAME}"
ENDLESS = 400_000
COMPLETION: Json = {"model": NAME, "prompt": "Once", "max_tokens": 1}
MOCK = merge(
    model_config(
        modelName=NAME, modelWeightPath=str(TINY_MODEL), modelInstanceType="StandardMock", ignore_eos=True
    ),
    {
        "BackendConfig": {
            "ScheduleConfig": {"maxIterTimes": ENDLESS},
            "ModelDeployConfig": {"maxSeqLen": ENDLESS + 1000},
        }
    },
)


def triton(priority: int = 5, tokens: int = 1) -> Json:
    return {"text_input": "Once", "parameters": {"max_new_tokens": tokens, "priority": priority}}


@contextlib.contextmanager
def endless(daemon: Daemon) -> Iterator[None]:
    """A stream that has begun and does not end by itself."""
    with contextlib.closing(daemon.connect()) as connection:
        connection.request("POST", f"{MODEL}/generate_stream", json.dumps(triton(tokens=ENDLESS)).encode())
        response = connection.getresponse()
        assert response.status == 200 and response.readline().startswith(b"data:")
        reading = Reading(response)
        try:
            yield
        finally:
            reading.hang_up(connection)


@contextlib.contextmanager
def sent(daemon: Daemon, body: Json) -> Iterator[http.client.HTTPConnection]:
    """A completion that has been asked for, its answer still to be read."""
    with contextlib.closing(daemon.connect()) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body).encode())
        yield connection


def in_background(count: int, work: Callable[[], Answer]) -> list[Answer]:
    with ThreadPoolExecutor(count) as pool:
        return [answer.result() for answer in [pool.submit(work) for _ in range(count)]]


def test_A31_P3_a_flood_is_refused_with_a_time_to_come_back(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(merge(MOCK, {"ServerConfig": {"maxLinkNum": 2}})).start().wait_ready()
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(contextlib.ExitStack())
        for _ in range(2):
            running.enter_context(endless(daemon))
        waiting = [stack.enter_context(sent(daemon, COMPLETION)) for _ in range(5)]
        take_refused(waiting)  # four wait, now the line is full
        refused = in_background(20, lambda: daemon.post("/v1/completions", COMPLETION))
        refused += in_background(20, lambda: daemon.post("/v1/completions", b"{ no JSON"))
        for answer in refused:
            assert answer.status == 503 and answer.json()["error_type"] == "Service Unavailable"
            assert 1 <= int(answer.headers["retry-after"]) <= 60 and "maxLinkNum" in answer.json()["error"]
        assert daemon.manage("/v2/health/live").status == 200
        assert daemon.request("GET", "/metrics", port=daemon.metrics_port).status == 200
        # it is refused for its head: the body need not have come
        with contextlib.closing(daemon.connect(timeout_s=30)) as connection:
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Length", "1000000")
            connection.endheaders()
            assert connection.getresponse().status == 503
        running.close()
        assert [connection.getresponse().status for connection in waiting] == [200] * 4
    assert daemon.post("/v1/completions", COMPLETION).status == 200
    warnings = [line for line in daemon.stderr.splitlines() if "requests refused" in line]
    assert 1 <= len(warnings) <= 5 and "line_full" in warnings[0], "no line for each"
    assert daemon.stop() == 0


@pytest.fixture(scope="module")
def single(installation: Installation) -> Iterator[Daemon]:
    """One sequence runs at a time, and what waits does not push it out for an hour."""
    narrow: Json = {
        "BackendConfig": {
            "ScheduleConfig": {
                "maxBatchSize": 1,
                "maxPrefillBatchSize": 1,
                "maxFirstTokenWaitTime": 3_600_000,
            },
            "runtimeConfig": {"maxWaitingTokens": 100},
        }
    }
    daemon = installation.daemon(merge(MOCK, narrow)).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


def waits_in_engine(daemon: Daemon) -> int:
    vector = daemon.manage("/metrics-json").json()["result"]
    return next(
        int(one["value"]) for one in vector if one["metric"][0]["__name__"] == "waitingInferRequestNum"
    )


def test_A31_waiting_prompt_tokens_are_bounded(single: Daemon) -> None:
    body = {**COMPLETION, "prompt": [300] * 60}
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(contextlib.ExitStack())
        running.enter_context(endless(single))
        waiting = stack.enter_context(sent(single, body))
        eventually(lambda: waits_in_engine(single) == 1, 20, "its 60 tokens wait")
        answer = single.post("/v1/completions", body)
        assert answer.status == 503 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert "60 prompt tokens wait for the model, and this request has 60" in answer.json()["error"]
        running.close()
        assert waiting.getresponse().status == 200
    assert single.post("/v1/completions", {**body, "prompt": [300] * 500}).status == 200, "alone it is let in"


def test_priorities_hold_from_the_request_to_the_engine(single: Daemon) -> None:
    ended: list[int] = []

    def post(priority: int) -> None:
        assert single.post(f"{MODEL}/generate", triton(priority, tokens=500)).status == 200
        ended.append(priority)

    threads = []
    with endless(single):
        for number, priority in enumerate((5, 3, 4, 1), 1):
            threads.append(threading.Thread(target=post, args=(priority,)))
            threads[-1].start()
            eventually(lambda n=number: waits_in_engine(single) == n, 20, "it waits")  # type: ignore[misc]
    for thread in threads:
        thread.join(30)
    assert ended == [1, 3, 4, 5]


def test_ageing_lets_the_last_priority_through_a_stream_of_the_first(make_daemon: MakeDaemon) -> None:
    """Two clients of priority 1 ask without a pause, of which one always waits."""
    limits = {"maxBatchSize": 1, "maxPrefillBatchSize": 1, "maxFirstTokenWaitTime": 200}
    daemon = make_daemon(merge(MOCK, {"BackendConfig": {"ScheduleConfig": limits}})).start().wait_ready()
    over = threading.Event()
    asked = [0, 0]

    def keep_asking(number: int) -> None:
        while not over.is_set():
            assert daemon.post(f"{MODEL}/generate", triton(1, tokens=500)).status == 200
            asked[number] += 1

    threads = [threading.Thread(target=keep_asking, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: min(asked) >= 2, 30, "both are served")
        answer = daemon.post(f"{MODEL}/generate", triton(5))
        assert answer.status == 200, "though somebody of a higher priority waited all the time"
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert daemon.stop() == 0


@pytest.mark.slow
def test_trials_of_grammars_and_token_counts_hold_no_place(make_daemon: MakeDaemon) -> None:
    """With one place, three trials of seconds and some long counts leave room for requests."""
    daemon = make_daemon(merge(MOCK, {"ServerConfig": {"maxLinkNum": 1}})).start().wait_ready()
    statuses: dict[str, list[int]] = {"grammar": [], "count": []}

    def try_out(number: int) -> None:
        body = {**COMPLETION, "guided_regex": f"{'y' * number}(((x{{100}}){{100}}){{100}}){{100}}"}
        statuses["grammar"].append(daemon.post("/v1/completions", body).status)

    def count() -> None:
        statuses["count"].append(daemon.post("/v1/tokenizer", {"inputs": "word " * 40_000}).status)

    threads = [threading.Thread(target=try_out, args=(number,)) for number in (1, 2, 3)]
    threads += [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    answered = [daemon.post("/v1/completions", COMPLETION).status for _ in range(4)]
    assert answered == [200] * 4 and len(statuses["grammar"]) < 3, "before the trials were over"
    for thread in threads:
        thread.join(60)
    assert statuses["grammar"] == [422] * 3
    assert Counter(statuses["count"]).keys() <= {200, 503} and 200 in statuses["count"]
    assert daemon.stop() == 0
