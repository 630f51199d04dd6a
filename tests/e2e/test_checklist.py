"""The feature table of docs/api.md: one test per endpoint and feature, on the running daemon.

The table itself is the list of tests. `Y` works; `i` is accepted and without effect; `422` is refused; `-`
does not exist there. The other marks are explained by the check of their row.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.endpoints import ENDING, ENDPOINTS, MODEL, NAME, PROMPT, PROMPT_IDS, TOKENS, Endpoint, Reading
from tests.harness import REPO, TINY_MODEL, Daemon, Installation, Json, eventually, merge, model_config

HEAD = "| feature | chat |"

Check = Callable[[Daemon, Endpoint, str], None]
CHECKS: dict[str, Check] = {}
ON_THE_ENDLESS_ONE = {"stopInfer", "abort on disconnect", "fullTextEnabled"}

LONG = 4000
SAMPLED: Json = {"temperature": 1.0, "seed": 5}
# what it takes that an ignored field would show if it were not ignored
IGNORED: dict[str, Json] = {
    "do_sample": {"do_sample": True, "seed": 5},
    "presence_penalty": {"presence_penalty": 2.0, "max_tokens": 60},
    "frequency_penalty": {"frequency_penalty": 2.0, "max_tokens": 60},
    "min_p": {"min_p": 1.0, "max_tokens": 30, **SAMPLED},
    "logit_bias": {"logit_bias": {str(token): -100 for token in range(1, 1000)}},
    "n": {"n": 2},
    "best_of": {"best_of": 2},
    "use_beam_search": {"use_beam_search": True},
    "stop": {"stop": ["a", "e", "i", "o", "u"]},
    "stop_token_ids": {"stop_token_ids": list(range(3, 1024))},
    "include_stop": {"include_stop_str_in_output": True},
    "skip_special_tokens": {"skip_special_tokens": False, "max_tokens": 60, "prompt": ENDING},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 60, "prompt": ENDING},
    "logprobs": {"logprobs": 3},
    "echo": {"echo": True},
    "response_format": {"response_format": {"type": "json_object"}},
    "priority": {"priority": 99},
    "timeout": {"timeout": -1},
}


def cells() -> Iterator[tuple[str, str, str]]:
    """(feature, endpoint, mark) for all that exists."""
    lines = (REPO / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(HEAD))
    head, _, *rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    _, *names, _ = columns(head)
    assert names == list(ENDPOINTS)
    for row in rows:
        feature, *marks, _ = columns(row)
        for name, mark in zip(names, marks, strict=True):
            if mark != "-":
                yield feature, name, mark


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def check(feature: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS[feature] = function
        return function

    return register


@pytest.fixture(scope="module")
def endless(installation: Installation) -> Iterator[Daemon]:
    """A daemon whose answers only their length ends, and whose frames carry all text so far."""
    changes = merge(
        {
            "ServerConfig": {"fullTextEnabled": True},
            "BackendConfig": {
                "ScheduleConfig": {"maxIterTimes": LONG},
                "ModelDeployConfig": {"maxSeqLen": LONG + 100},
            },
        },
        model_config(modelName=NAME, modelWeightPath=str(TINY_MODEL), ignore_eos=True),
    )
    daemon = installation.daemon(changes).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.mark.parametrize(
    ("feature", "name", "mark"), [pytest.param(*c, id=f"{c[0]}-{c[1]}") for c in cells()]
)
def test_cell(request: pytest.FixtureRequest, feature: str, name: str, mark: str) -> None:
    daemon: Daemon = request.getfixturevalue("endless" if feature in ON_THE_ENDLESS_ONE else "server")
    endpoint = ENDPOINTS[name]
    if mark == "i":
        check_ignored(daemon, endpoint, feature)
    else:
        CHECKS[feature](daemon, endpoint, mark)


def check_ignored(server: Daemon, endpoint: Endpoint, feature: str) -> None:
    option = IGNORED[feature]
    others = {
        name: value
        for name, value in option.items()
        if name in ("temperature", "seed", "max_tokens", "prompt")
    }
    for stream in modes(endpoint):
        assert said(ask(server, endpoint, stream, **option)) == said(ask(server, endpoint, stream, **others))


# -- asking ------------------------------------------------------------------------------------------


def modes(endpoint: Endpoint) -> list[bool]:
    """The values of `stream` worth asking with."""
    return [False, True] if endpoint.streams == "by field" else [False]


def ask(
    server: Daemon, endpoint: Endpoint, stream: bool = False, prompt: Any = None, **options: Any
) -> Reading:
    if endpoint.family in ("tgi", "native", "triton"):
        options.setdefault("details", True)
    prompted = PROMPT if prompt is None else prompt
    return endpoint.read(endpoint.ask(server, prompt, stream=stream, **options), prompted)


def said(reading: Reading) -> str | list[int]:
    return reading.ids or reading.text


def refused(server: Daemon, endpoint: Endpoint, field: str, **options: Any) -> None:
    answer = endpoint.ask(server, **options)
    assert answer.status == 422, answer.body
    assert field in answer.json()["error"]


def differs_by_seed(server: Daemon, endpoint: Endpoint, **options: Any) -> bool:
    return len({str(said(ask(server, endpoint, seed=seed, **options))) for seed in range(4)}) > 1


def greedy_ids(server: Daemon, prompt: str | list[int], count: int) -> list[int]:
    return ask(server, ENDPOINTS["infer_token"], True, prompt, max_tokens=count).ids


# -- answers -----------------------------------------------------------------------------------------


@check("whole answer")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    reading = ask(server, endpoint)
    assert said(reading)
    if reading.num_tokens is not None:
        assert reading.num_tokens == TOKENS
    if endpoint.family not in ("chat", "tensors"):
        assert reading.text == ask(server, ENDPOINTS["completions"]).text


@check("stream")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    reading = ask(server, endpoint, True)
    whole = endpoint if endpoint.streams == "by field" else ENDPOINTS["completions"]
    assert len(reading.frames) == TOKENS and reading.text == ask(server, whole).text


@check("done")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        raw = endpoint.ask(server, stream=True, **options).body
        assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b"[DONE]") == 1


@check("usage")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    whole = ask(server, endpoint).body["usage"]
    assert whole["completion_tokens"] == len(whole["batch_size"]) == len(whole["queue_wait_time"]) == TOKENS
    assert whole["total_tokens"] == whole["prompt_tokens"] + TOKENS
    frames = ask(server, endpoint, True).frames
    assert ["usage" in frame for frame in frames] == [False] * (TOKENS - 1) + [True]
    assert frames[-1]["usage"]["completion_tokens"] == TOKENS


@check("include usage")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    body = endpoint.body(stream=True, stream_options={"include_usage": True})
    *frames, done = server.frames(endpoint.path, body)
    totals = json.loads(frames[-1])
    assert done == "[DONE]" and totals["choices"] == []
    assert totals["usage"]["completion_tokens"] == TOKENS == len(totals["usage"]["batch_size"])
    assert all("usage" not in json.loads(frame) for frame in frames[:-1])


@check("token ids")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    expected = greedy_ids(server, PROMPT_IDS, TOKENS)
    reading = ask(server, endpoint, endpoint.family == "native", PROMPT_IDS)
    if reading.ids:
        assert reading.ids == expected
    else:
        assert reading.text == ask(server, ENDPOINTS["infer"], True, PROMPT_IDS).text
    bad = endpoint.ask(server, [PROMPT_IDS[0], 10**6])
    assert bad.status == 424 and "vocabulary" in bad.json()["error"]


@check("text parts")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    parts = [{"type": "text", "text": piece} for piece in (PROMPT[:4], PROMPT[4:])]
    for stream in modes(endpoint):
        answer = endpoint.ask(server, parts, stream=stream)
        assert endpoint.read(answer).text == ask(server, endpoint, stream).text
    picture = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    assert endpoint.ask(server, picture).status == 422


# -- sampling ----------------------------------------------------------------------------------------


@check("temperature 0")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    if mark == "422":
        refused(server, endpoint, "temperature", temperature=0)
        return
    for stream in modes(endpoint):
        zero = ask(server, endpoint, stream, temperature=0, top_k=50, seed=3)
        assert zero.text == ask(server, endpoint, stream).text


@check("do_sample")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    assert differs_by_seed(server, endpoint, do_sample=True, max_tokens=30)
    plain = ask(server, endpoint, max_tokens=30)
    assert said(ask(server, endpoint, do_sample=False, temperature=1.5, max_tokens=30)) == said(plain)
    refused(server, endpoint, "do_sample", do_sample=1)


@check("top_k off")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    expected = said(ask(server, endpoint, **SAMPLED))
    for value in (0, -1):
        if str(value) in mark.split():
            assert said(ask(server, endpoint, top_k=value, **SAMPLED)) == expected
        else:
            refused(server, endpoint, "top_k", top_k=value)
    assert said(ask(server, endpoint, top_k=1, **SAMPLED)) == said(ask(server, endpoint))


@check("top_p 1")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    if mark == "422":
        refused(server, endpoint, "top_p", top_p=1.0)
    else:
        assert said(ask(server, endpoint, top_p=1.0, **SAMPLED)) == said(ask(server, endpoint, **SAMPLED))
    assert said(ask(server, endpoint, top_p=1e-6, **SAMPLED)) == said(ask(server, endpoint))


@check("seed")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    for stream in modes(endpoint):
        one, two = (ask(server, endpoint, stream, max_tokens=30, **SAMPLED) for _ in range(2))
        assert said(one) == said(two)
    assert differs_by_seed(server, endpoint, temperature=1.0, max_tokens=30)
    refused(server, endpoint, "seed", seed=-1)


@check("seed reported")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    for stream in modes(endpoint):
        given = ask(server, endpoint, stream, **SAMPLED)
        assert details_of(given)["seed"] == 5
        drawn = details_of(ask(server, endpoint, stream, temperature=1.0))["seed"]
        assert isinstance(drawn, int)
        again = ask(server, endpoint, stream, temperature=1.0, seed=drawn)
        assert details_of(again)["seed"] == drawn


def details_of(reading: Reading) -> Json:
    one = reading.frames[-1] if reading.frames else reading.body
    details: Json = (one[0] if isinstance(one, list) else one)["details"]
    return details


@check("repetition_penalty")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    plain = said(ask(server, endpoint, max_tokens=60))
    assert said(ask(server, endpoint, max_tokens=60, repetition_penalty=1.9)) != plain
    assert said(ask(server, endpoint, max_tokens=60, repetition_penalty=1.0)) == plain
    refused(server, endpoint, "repetition_penalty", repetition_penalty=0)
    if endpoint.takes_parameters:
        ask(server, endpoint, repetition_penalty=2.5)
    else:
        refused(server, endpoint, "repetition_penalty", repetition_penalty=2.5)


def _penalty(field: str) -> Check:
    def penalty(server: Daemon, endpoint: Endpoint, mark: str) -> None:
        # words only, so that the model is less sure of what comes next
        near: Json = {"max_tokens": 60}
        if endpoint.is_openai:
            near["logit_bias"] = {str(token): 100 for token in range(300, 800)}
        plain = said(ask(server, endpoint, **near))
        assert said(ask(server, endpoint, **near, **{field: 2.0})) != plain
        for beyond in (-2.1, 2.1):
            refused(server, endpoint, field, **{field: beyond})

    return penalty


CHECKS["presence_penalty"] = _penalty("presence_penalty")
CHECKS["frequency_penalty"] = _penalty("frequency_penalty")


@check("min_p")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    greedy = ask(server, endpoint, max_tokens=30).text
    assert differs_by_seed(server, endpoint, temperature=1.0, max_tokens=30)
    for seed in range(4):
        assert ask(server, endpoint, max_tokens=30, temperature=1.0, min_p=1.0, seed=seed).text == greedy
    refused(server, endpoint, "min_p", min_p=1.1)


@check("logit_bias")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    wanted = greedy_ids(server, PROMPT, 3)[2]  # any token with text of its own
    reading = ask(server, endpoint, logit_bias={str(wanted): 100}, max_tokens=4)
    once = ask(server, endpoint, logit_bias={str(wanted): 100}, max_tokens=1)
    assert reading.text == once.text * 4
    refused(server, endpoint, "logit_bias", logit_bias={"first": 1})
    refused(server, endpoint, "logit_bias", logit_bias={"5": 101})


@check("n")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    answer = endpoint.ask(server, n=3, ignore_eos=True, **SAMPLED).json()
    texts = texts_of(answer)
    assert len(texts) == 3 and len(set(texts)) > 1
    assert texts[0].endswith(ask(server, endpoint, ignore_eos=True, **SAMPLED).text)
    refused(server, endpoint, "n", n=0)
    streamed = endpoint.ask(server, stream=True, n=2, ignore_eos=True, **SAMPLED)
    assert endpoint.read(streamed).text == ask(server, endpoint, ignore_eos=True, **SAMPLED).text


def texts_of(answer: Json) -> list[str]:
    if "text" in answer:
        texts: list[str] = answer["text"]
        return texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]


@check("best_of")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    options = {"n": 2, "best_of": 4, "ignore_eos": True, **SAMPLED}
    best = endpoint.ask(server, **options).json()
    every = texts_of(endpoint.ask(server, **{**options, "n": 4}).json())
    assert len(texts_of(best)) == 2 and set(texts_of(best)) <= set(every)
    if endpoint.is_openai:
        assert best["usage"]["completion_tokens"] == 4 * TOKENS
    refused(server, endpoint, "best_of", best_of=129)
    if endpoint.family != "vllm":
        refused(server, endpoint, "best_of", best_of=3, n=2, stream=True)


@check("use_beam_search")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    options: Json = {"use_beam_search": True, "n": 3}
    one, two = (texts_of(endpoint.ask(server, seed=s, temperature=2, **options).json()) for s in (1, 2))
    assert one == two and len(set(one)) == 3
    assert endpoint.read(endpoint.ask(server, stream=True, **options)).text == one[0]
    refused(server, endpoint, "max_tokens", use_beam_search=True, max_tokens=129)


# -- stopping ----------------------------------------------------------------------------------------


@check("stop")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    text = ask(server, endpoint, max_tokens=40).text
    stop = text[9:14]
    for stream in modes(endpoint):
        reading = ask(server, endpoint, stream, max_tokens=40, stop=["never there", stop])
        assert reading.text == text[: text.index(stop)]
        assert reading.finish in (None, "stop", "stop_sequence")
        assert ask(server, endpoint, stream, max_tokens=40, stop=stop).text == reading.text
    refused(server, endpoint, "stop", stop=[""])


@check("stop_token_ids")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    third = greedy_ids(server, PROMPT, 3)[2]
    forced: Json = {"logit_bias": {str(third): 100}} if endpoint.is_openai else {}
    for stream in modes(endpoint):
        reading = ask(server, endpoint, stream, stop_token_ids=[third], **forced)
        assert reading.finish in (None, "stop")
        assert len(reading.text) < len(ask(server, endpoint, max_tokens=3).text)
        assert not reading.frames or len(reading.frames) <= 3
    assert ask(server, endpoint, stop_token_ids=[-1, 2**40]).text == ask(server, endpoint).text
    refused(server, endpoint, "stop_token_ids", stop_token_ids=["5"])


@check("include_stop")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    text = ask(server, endpoint, max_tokens=40).text
    stop = text[9:14]
    for stream in modes(endpoint):
        reading = ask(server, endpoint, stream, max_tokens=40, stop=stop, include_stop_str_in_output=True)
        assert reading.text == text[: text.index(stop)] + stop


@check("skip_special_tokens")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    if endpoint.family == "chat":  # whose answers end when the model likes
        forced: Json = {"logit_bias": {"0": 100}, "max_tokens": 2}
    else:
        forced = {"prompt": ENDING, "max_tokens": 60}
    for stream in modes(endpoint):
        hidden = ask(server, endpoint, stream, **forced)
        shown = ask(server, endpoint, stream, **forced, skip_special_tokens=False)
        assert shown.text == f"{hidden.text}<|endoftext|>"


@check("ignore_eos")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    for stream in modes(endpoint):
        reading = ask(server, endpoint, stream, ignore_eos=True, max_tokens=60, prompt=ENDING)
        assert reading.num_tokens in (None, 60) and (not stream or len(reading.frames) == 60)
        assert reading.finish in (None, "length")


# -- what else an answer carries ---------------------------------------------------------------------


@check("logprobs")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    chat = endpoint.family == "chat"
    options: Json = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    whole = ask(server, endpoint, **options).body["choices"][0]["logprobs"]
    values = [entry["logprob"] for entry in whole["content"]] if chat else whole["token_logprobs"]
    assert len(values) == TOKENS and all(value <= 0 for value in values)
    frames = ask(server, endpoint, True, **options).frames
    pieces = [frame["choices"][0]["logprobs"] for frame in frames]
    streamed = (
        [entry["logprob"] for piece in pieces for entry in piece["content"]]
        if chat
        else [value for piece in pieces for value in piece["token_logprobs"]]
    )
    assert streamed == pytest.approx(values, abs=0.05)  # of different batches: equal to rounding
    assert ask(server, endpoint).body["choices"][0]["logprobs"] is None


@check("prompt_logprobs")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    body = ask(server, endpoint, prompt_logprobs=1).body
    entries = body["prompt_logprobs"] if endpoint.family == "chat" else body["choices"][0]["prompt_logprobs"]
    assert len(entries) == body["usage"]["prompt_tokens"] and entries[0] is None
    for entry in entries[1:]:
        assert 1 <= len(entry) <= 2
        assert all(told["logprob"] <= 0 and told["rank"] >= 1 for told in entry.values())
    refused(server, endpoint, "prompt_logprobs", prompt_logprobs=21)


@check("echo")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    if mark == "always":
        assert endpoint.ask(server).json()["text"][0].startswith(PROMPT)
        return
    plain = ask(server, endpoint).text
    for stream in modes(endpoint):
        assert ask(server, endpoint, stream, echo=True).text == PROMPT + plain
    of_ids = ask(server, endpoint, prompt=PROMPT_IDS, echo=True).text
    assert of_ids.endswith(ask(server, endpoint, prompt=PROMPT_IDS).text) and len(of_ids) > len(plain) // 2


@check("return_full_text")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    plain = ask(server, endpoint).text
    for stream in modes(endpoint):
        assert ask(server, endpoint, stream, return_full_text=True).text == f"{PROMPT} {plain}"


@check("response_format")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    for stream in modes(endpoint):
        reading = ask(server, endpoint, stream, response_format=wanted, max_tokens=60)
        assert reading.finish == "stop" and json.loads(reading.text)["yes"] in (True, False)
    refused(server, endpoint, "response_format", response_format={"type": "yaml"})


SCHEMA: Json = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}


@check("structured_outputs")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    forms: list[tuple[Json, set[str]]] = [
        ({"choice": ["red", "blue"]}, {"red", "blue"}),
        ({"regex": "r(ed|ose)"}, {"red", "rose"}),
        ({"grammar": 'start: "red" | "blue"'}, {"red", "blue"}),
    ]
    for stream in modes(endpoint):
        for form, allowed in forms:
            assert ask(server, endpoint, stream, structured_outputs=form, max_tokens=20).text in allowed
        reading = ask(server, endpoint, stream, structured_outputs={"json": SCHEMA}, max_tokens=60)
        assert json.loads(reading.text).keys() == {"yes"}


@check("tools")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    tool = {"type": "function", "function": {"name": "answer", "parameters": SCHEMA}}
    options: Json = {
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 100,
    }
    choice = ask(server, endpoint, **options).body["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and isinstance(choice["message"]["content"], str)
    assert call["type"] == "function" and call["function"]["name"] == "answer"
    assert json.loads(call["function"]["arguments"])["yes"] in (True, False)
    deltas = [frame["choices"][0]["delta"] for frame in ask(server, endpoint, True, **options).frames]
    calls = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "answer" and calls[0]["id"].startswith("call_")
    arguments = "".join(part["function"].get("arguments", "") for part in calls)
    assert arguments == call["function"]["arguments"]
    refused(server, endpoint, "tools", tools=[{"type": "function"}])


@check("chat_template_kwargs")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    # the shipped template has no such variable: without effect, but checked
    plain = ask(server, endpoint).text
    assert ask(server, endpoint, chat_template_kwargs={"enable_thinking": False}).text == plain
    refused(server, endpoint, "chat_template_kwargs", chat_template_kwargs=[])
    refused(server, endpoint, "enable_thinking", chat_template_kwargs={"enable_thinking": 1})
    refused(server, endpoint, "thinking_budget", chat_template_kwargs={"thinking_budget": 0})


@check("details")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    for stream in modes(endpoint):
        with_details = details_of(ask(server, endpoint, stream))
        assert with_details["finish_reason"] == "length" and with_details["generated_tokens"] == TOKENS
        without = ask(server, endpoint, stream, details=False)
        last = without.frames[-1] if without.frames else without.body
        assert not (last[0] if isinstance(last, list) else last).get("details")


@check("perf_stat")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    stat = details_of(ask(server, endpoint, perf_stat=True))["perf_stat"]
    assert [token for token, _ in stat] == greedy_ids(server, PROMPT, TOKENS)
    assert all(type(ms) is int and ms >= 0 for _, ms in stat)
    assert not details_of(ask(server, endpoint)).get("perf_stat")


@check("priority")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    plain = said(ask(server, endpoint))
    assert all(said(ask(server, endpoint, priority=value)) == plain for value in (1, 5))
    for value in (0, 6, 1.5, "1"):
        refused(server, endpoint, "priority", priority=value)


@check("timeout")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    assert said(ask(server, endpoint, timeout=65535)) == said(ask(server, endpoint))
    for value in (0, -1, 65536, 1.5):
        refused(server, endpoint, "timeout", timeout=value)


# -- while it runs -----------------------------------------------------------------------------------


def running(server: Daemon) -> int:
    count: int = server.manage("/v1/status").json()["resource"]["runningRequestNum"]
    return count


@check("stopInfer")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    name = f"stop-{endpoint.name.replace(' ', '-')}"
    with contextlib.closing(server.connect()) as connection:
        body = {**endpoint.body(max_tokens=LONG), "id": name}
        connection.request("POST", endpoint.path, json.dumps(body).encode())
        stop = {"id": name}
        eventually(lambda: server.post(f"{MODEL}/stopInfer", stop).json() == stop, 30.0, "the id is known")
        response = connection.getresponse()
        assert response.status == 200 and response.read()
    assert server.post(f"{MODEL}/stopInfer", stop).status == 404


@check("abort on disconnect")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    eventually(lambda: running(server) == 0, 30.0, "an idle server")
    connection = server.connect()
    body = endpoint.body(stream=True, max_tokens=LONG)
    connection.request("POST", endpoint.path, json.dumps(body).encode())
    eventually(lambda: running(server) == 1, 30.0, "the request runs")
    connection.close()
    eventually(lambda: running(server) == 0, 5.0, "nobody is served any more")


@check("fullTextEnabled")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    answer = endpoint.ask(server, stream=True)
    assert answer.status == 200
    if endpoint.family == "vllm":
        texts = [json.loads(record)["text"][0] for record in answer.body[:-1].split(b"\0")]
    else:
        frames = endpoint.read(answer).frames
        texts = [text_so_far(frame) for frame in frames if text_so_far(frame) is not None]
    assert len(texts) > 2 and all(after.startswith(before) for before, after in itertools.pairwise(texts))
    whole = ENDPOINTS["chat"] if endpoint.family == "chat" else ENDPOINTS["completions"]
    assert texts[-1] == ask(server, whole).text


def text_so_far(frame: Json) -> Any:
    if "choices" in frame:
        choice = frame["choices"][0]
        return choice["delta"]["content"] if "delta" in choice else choice["text"]
    if "text_output" in frame:
        return frame["text_output"]
    return frame["token"]["text"] if frame["token"]["text"] is not None else frame["generated_text"]


@check("unknown model in path")
def _(server: Daemon, endpoint: Endpoint, mark: str) -> None:
    answer = server.post(endpoint.path.replace(NAME, "other"), endpoint.body())
    assert answer.status == 404 and answer.json()["error_type"] == "NotFoundError"


def test_every_row_has_a_check() -> None:
    assert {feature for feature, _, mark in cells() if mark != "i"} == set(CHECKS)
