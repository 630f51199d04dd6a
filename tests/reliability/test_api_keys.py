"""API keys on a running daemon: nothing answers without one, and nobody reaches into another's requests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import re
import threading
from collections.abc import Iterator

import pytest
from aiohttp.test_utils import TestClient, TestServer

from endpoint.api_keys import PUBLIC_PATHS, ApiKeys
from endpoint.app import make_app
from endpoint.operations import template
from engine.settings import ApiKeySettings
from tests.endpoint.test_openapi import ADAPTERS, SETTINGS, planes
from tests.harness import TINY_MODEL, Answer, Daemon, Installation, Json, eventually, merge, model_config
from tests.streams import Reading, take_refused

NAME = "mindie-tiny"
MODEL = f"/v2/models/{NAME}"
KEYS = {name: f"canary-key-of-{name}" for name in ("alice", "bob", "carol", "dora")}
LIMITS: dict[str, Json] = {"bob": {"maxRunning": 1, "maxQueued": 1}, "carol": {"tokensPerMinute": 30}}
ENDLESS = 400_000
CONFIG: Json = {
    "ServerConfig": {"maxLinkNum": 3},
    "BackendConfig": {
        "ScheduleConfig": {"maxIterTimes": ENDLESS},
        "ModelDeployConfig": {"maxSeqLen": ENDLESS + 1000},
        "runtimeConfig": {
            "apiKeys": [
                {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **LIMITS.get(name, {})}
                for name, key in KEYS.items()
            ]
        },
    },
}
COMPLETION: Json = {"model": NAME, "prompt": "Once", "max_tokens": 1}
TRITON: Json = {"text_input": "Once", "parameters": {"max_new_tokens": ENDLESS}}


@pytest.fixture(scope="module")
def guarded(installation: Installation) -> Iterator[Daemon]:
    mock = model_config(
        modelName=NAME, modelWeightPath=str(TINY_MODEL), modelInstanceType="StandardMock", ignore_eos=True
    )
    daemon = installation.daemon(merge(CONFIG, mock)).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    logged = daemon.stdout + daemon.stderr
    for key in KEYS.values():
        assert key not in logged and hashlib.sha256(key.encode()).hexdigest() not in logged


def headers_of(who: str | None) -> dict[str, str]:
    return {} if who is None else {"Authorization": f"Bearer {KEYS[who]}"}


@contextlib.contextmanager
def sent(
    daemon: Daemon, who: str | None, path: str, body: Json | None, method: str = "POST", port: int = 0
) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(daemon.connect(port)) as connection:
        raw = None if body is None else json.dumps(body).encode()
        connection.request(method, path, raw, headers_of(who))
        yield connection


def ask(
    daemon: Daemon, who: str | None, path: str, body: Json | None = None, method: str = "POST", port: int = 0
) -> Answer:
    with sent(daemon, who, path, body, method, port) as connection:
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@contextlib.contextmanager
def endless(daemon: Daemon, who: str, **members: str) -> Iterator[Reading]:
    """A stream that has begun and does not end by itself."""
    with sent(daemon, who, f"{MODEL}/generate_stream", {**TRITON, **members}) as connection:
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.readline().startswith(b"data:")
        reading = Reading(response)
        try:
            yield reading
        finally:
            reading.hang_up(connection)


# -- A20 ---------------------------------------------------------------------------------------------


def test_A20_every_route_of_every_plane_is_denied_without_a_key() -> None:
    """The route table itself is walked, so that a route nobody thought of is denied as well."""

    async def walk() -> tuple[set[str], set[str]]:
        keys = ApiKeys([ApiKeySettings("k", hashlib.sha256(b"k").digest())])
        app = make_app(("business", "management", "metrics"), *planes(ADAPTERS), SETTINGS, keys)
        routes = {
            (route.method, template(route.resource.canonical))
            for route in app.router.routes()
            if route.resource is not None
        }
        denied, answered = set(), set()
        async with TestClient(TestServer(app)) as client:
            for method, path in sorted(routes):
                address = path.replace("{model}", NAME).replace("{seconds}", "1")
                for given in ({}, {"x-api-key": "wrong"}, {"Authorization": "Bearer kk"}):
                    response = await client.request(method, address, headers=given)
                    (denied if response.status == 401 else answered).add(path)
        return denied, answered

    denied, answered = asyncio.run(walk())
    assert answered == set(PUBLIC_PATHS) and not denied & answered
    assert len(denied) > 30 and {"/metrics", "/stopService", "/docs", "/v1/models", "/infer"} <= denied


def test_A20_on_the_running_planes(guarded: Daemon) -> None:
    for port in (guarded.port, guarded.management_port, guarded.metrics_port):
        for route in ("GET /nowhere", "PUT /v1/models", "OPTIONS /", "GET /metrics", "HEAD /v2"):
            method, path = route.split()
            answer = ask(guarded, None, path, None, method, port)
            assert answer.status == 401, (port, method, path)
            assert method == "HEAD" or answer.json()["error_type"] == "Unauthorized"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in PUBLIC_PATHS:
        assert guarded.manage(path).status == 200
        assert ask(guarded, None, path, None, "GET", guarded.port).status == 404, "not of this plane"
    assert guarded.manage("/v2/health/live/").status == guarded.manage("//v2/health/live").status == 401
    assert guarded.post("/v1/completions", b"{" * 1000).status == 401, "before the body is looked at"
    assert ask(guarded, "alice", "/v1/completions", COMPLETION).status == 200
    assert ask(guarded, "alice", "/metrics", None, "GET", guarded.metrics_port).status == 200


# -- A21 ---------------------------------------------------------------------------------------------


def test_A21_wrong_keys_are_refused_and_told_once(guarded: Daemon) -> None:
    for _ in range(20):
        with contextlib.closing(guarded.connect()) as connection:
            connection.request("GET", "/v1/models", headers={"api-key": "canary-guess"})
            response = connection.getresponse()
            assert response.status == 401 and b"canary" not in response.read()
    lines = [line for line in guarded.stderr.splitlines() if "without a valid API key" in line]
    assert 1 <= len(lines) <= 5 and "[WARN]" in lines[0] and "127.0.0.1" in lines[0]
    assert "canary-guess" not in guarded.stderr
    audit, denied = "security/mindie-server", "[GET /v1/models] [401 "
    eventually(lambda: guarded.log(audit).count(denied) >= 20, 10.0, "the lines of the audit log")
    assert "canary-guess" not in guarded.log(audit)
    told = ask(guarded, "alice", "/metrics", None, "GET", guarded.metrics_port)
    (count,) = re.findall(
        rb'^mindie_requests_refused_total\{.*reason="no_key"\} (\S+)', told.body, re.MULTILINE
    )
    assert float(count) >= 20
    served = f"[GET /metrics] [200 {told.headers['requestuuid']} key=alice]"
    eventually(lambda: served in guarded.log(audit), 10.0, "whose request it was")


# -- A24 ---------------------------------------------------------------------------------------------


def test_A24_only_the_same_key_can_stop_a_request(guarded: Daemon) -> None:
    stop = f"{MODEL}/stopInfer"
    with endless(guarded, "alice", id="mine") as stream:
        refused = ask(guarded, "dora", stop, {"id": "mine"})
        assert refused.status == 404
        unknown = ask(guarded, "dora", stop, {"id": "never-was"})
        assert refused.json()["error"] == unknown.json()["error"], "nor learn of it"
        with endless(guarded, "dora", id="mine") as other:  # a name is the key's own
            assert ask(guarded, "dora", stop, {"id": "mine"}).status == 200
            other.whole()
        stream.more()
        assert ask(guarded, "alice", stop, {"id": "mine"}).status == 200
        assert stream.whole().rstrip().endswith(b"}"), "ended well"


def test_A24_ids_of_requests_cannot_be_guessed(guarded: Daemon) -> None:
    answers = [ask(guarded, "alice", "/v1/completions", COMPLETION) for _ in range(2)]
    ids = {answer.headers["requestuuid"] for answer in answers}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


# -- A32 ---------------------------------------------------------------------------------------------


def test_A32_a_key_that_takes_every_place_does_not_keep_another_out(guarded: Daemon) -> None:
    done = threading.Event()
    answers: list[int] = []

    def post(who: str, body: Json) -> None:
        answers.append(ask(guarded, who, "/v1/completions", body).status)
        if who == "dora":
            done.set()

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        first.enter_context(endless(guarded, "alice"))
        for _ in range(2):
            stack.enter_context(endless(guarded, "alice"))
        crowd = {**COMPLETION, "max_tokens": ENDLESS, "stream": True}
        waiting = [stack.enter_context(sent(guarded, "alice", "/v1/completions", crowd)) for _ in range(7)]
        take_refused(waiting)  # six wait, now the line is full
        thread = threading.Thread(target=post, args=("dora", COMPLETION))
        thread.start()  # the last of the crowd makes room for it
        take_refused(waiting)
        assert not done.is_set()
        first.close()  # one place becomes free: it is not for the five of alice that came before
        assert done.wait(30)
        thread.join()
    assert answers == [200]


def test_A32_a_key_has_limits_of_its_own(guarded: Daemon) -> None:
    with endless(guarded, "bob"), sent(guarded, "bob", "/v1/completions", COMPLETION) as second:
        eventually(lambda: ask(guarded, "bob", "/v1/completions", COMPLETION).status == 429, 20, "maxQueued")
        answer = ask(guarded, "bob", "/v1/completions", COMPLETION)
        assert answer.json()["error_type"] == "Too Many Requests" and "bob" in answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1
        assert ask(guarded, "alice", "/v1/completions", COMPLETION).status == 200, "there are places"
        second.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.getresponse()


def test_A32_tokens_per_minute(guarded: Daemon) -> None:
    body = {**COMPLETION, "prompt": [300] * 10, "max_tokens": 40}
    assert ask(guarded, "carol", "/v1/completions", body).status == 200
    answer = ask(guarded, "carol", "/v1/completions", body)
    assert answer.status == 429 and "tokensPerMinute = 30" in answer.json()["error"]
    assert 30 <= int(answer.headers["retry-after"]) <= 42, "20 on credit come back at one in two seconds"
    assert ask(guarded, "carol", "/v1/tokenizer", {"inputs": "x"}).status == 429
    assert ask(guarded, "carol", "/v1/models", None, "GET").status == 200, "which costs no tokens"
