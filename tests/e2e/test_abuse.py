"""Requests that mean harm, against one daemon with few cache blocks: they cost themselves and nobody else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import TINY_MODEL, Answer, Daemon, Installation, Json, eventually
from tests.lora_adapters import write_adapter

NAME = "mindie-tiny"
BLOCKS = 170  # of 16 tokens: just more than one sequence of maxSeqLen
SLOTS = f"/v2/models/{NAME}/getSlotCount"
PROMPTS = ("Once upon a time", "The cat", "1 + 1 = ", "a b c d e f g h i j k l m n o p")
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def daemon(installation: Installation) -> Iterator[Daemon]:
    backend = {
        "runtimeConfig": {"kvCacheBlockNum": BLOCKS},
        "ScheduleConfig": {"cacheBlockSize": 16},
        "ModelDeployConfig": {"maxLoras": 2, "maxLoraRank": 16},
    }
    daemon = installation.daemon({"BackendConfig": backend}).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr
    assert "Traceback" not in daemon.stderr


@pytest.fixture(scope="module")
def texts(daemon: Daemon) -> list[str]:
    """What the server says before anything bad has come."""
    return [text(daemon, prompt) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def nothing_is_left(daemon: Daemon, texts: list[str]) -> Iterator[None]:
    """Every test ends with all blocks free, no child but the helpers, and the same answers."""
    yield
    eventually(lambda: free_tokens(daemon) == BLOCKS * 16, 10.0, "all blocks free")
    eventually(lambda: not template_children(daemon), 10.0, "no process renders a template")
    assert [text(daemon, prompt) for prompt in PROMPTS] == texts


def completion(**more: Any) -> Json:
    return {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, **more}


def chat(**more: Any) -> Json:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": NAME, "messages": messages, "max_tokens": 4, "temperature": 0, **more}


def text(daemon: Daemon, prompt: str, model: str = NAME) -> str:
    body = completion(prompt=prompt, model=model, ignore_eos=True)
    answer = daemon.post("/v1/completions", body)
    assert answer.status == 200, answer.body
    return str(answer.json()["choices"][0]["text"])


def free_tokens(daemon: Daemon) -> int:
    return int(daemon.manage(SLOTS).json()["available_tokens_length"])


def template_children(daemon: Daemon) -> list[psutil.Process]:
    found = []
    for process in daemon.child("endpoint").children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("template_child" in word for word in process.cmdline()):
                found.append(process)
    return found


def adapters(daemon: Daemon, action: str, **body: str) -> Answer:
    return daemon.request("POST", f"/v1/{action}_lora_adapter", dict(body), port=daemon.management_port)


# -- grammars -------------------------------------------------------------------------------------------

GRAMMARS: dict[str, Json] = {
    "native loop": {"guided_json": {"type": "integer", "multipleOf": 9999991}},
    "repeats multiply": {"guided_regex": "((a{100}){100}){100}"},
    "nested groups": {"guided_regex": "(" * 20_000 + "a" + ")" * 20_000},
    "nested Lark": {"guided_grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "nested GBNF": {"guided_grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
    "nested JSON text": {"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "endless rule": {"guided_grammar": "root ::= root\n"},
    "references in a circle": {"guided_json": {"$ref": "#"}},
    "a reference to a file": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "nothing fits": {"guided_regex": "[^\\s\\S]"},
    "a token out of range": {"guided_grammar": "start: <[0-999999]>\n"},
    "too long": {"guided_choice": ["x" * 65_536]},
}


def test_A11_hostile_grammars_cost_one_422_each(daemon: Daemon) -> None:
    for attack, form in GRAMMARS.items():
        answer = daemon.post("/v1/completions", completion(**form))
        assert answer.status == 422, (attack, answer.body)
        error = answer.json()["error"]
        assert next(iter(form)) in error and "root:" not in error, attack


# -- templates ------------------------------------------------------------------------------------------

TEMPLATES = {
    "memory": "{{ 'a' * 10**9 }}",
    "memory of a format": "{{ '%1000000000d' | format(1) }}",
    "output": "{% for i in range(50000) %}{{ 'abcdefghi ' * 10 }}{% endfor %}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}{{ os }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ strftime_now.__globals__['os'].system('true') }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "nesting": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "half a character": "{{ '\\ud800' }}",
    "a path": "../chat_template.jinja",
}


def test_A13_hostile_templates_cost_one_422_each(daemon: Daemon) -> None:
    for attack, template in TEMPLATES.items():
        answer = daemon.post("/v1/chat/completions", chat(chat_template=template))
        assert answer.status == 422, (attack, answer.body)
        error = answer.json()["error"]
        assert "chat_template" in error and "root:" not in error, attack


def test_A13_endless_templates_end_with_their_clients(daemon: Daemon) -> None:
    """Also those that wait for their turn. Honest ones get theirs."""
    body = json.dumps(chat(chat_template=ENDLESS)).encode()
    connections = [daemon.connect() for _ in range(20)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", body)
    eventually(lambda: template_children(daemon), 10.0, "one is rendered")
    for connection in connections:
        connection.close()
    answer = daemon.post("/v1/chat/completions", chat(chat_template="{{ messages[0].content }}"))
    assert answer.status == 200, answer.body


# -- the engine -----------------------------------------------------------------------------------------


def test_wide_requests_whose_clients_leave(daemon: Daemon) -> None:
    """More branches than the cache holds, so that they are preempted while they run."""
    wide = completion(
        prompt=["a b"] * 6, n=8, temperature=1, seed=1, max_tokens=200, ignore_eos=True, stream=True
    )
    for _ in range(3):
        with daemon.streaming("/v1/completions", wide) as response:
            assert response.status == 200
            assert response.read(1)


def test_stop_from_all_sides(daemon: Daemon) -> None:
    """One request is stopped by many at once: it ends well, and nobody gets anything but 200 or 404."""
    path = f"/v2/models/{NAME}"
    parameters = {"max_new_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        for number in range(4):
            name = {"id": f"victim-{number}"}
            with daemon.streaming(
                f"{path}/generate_stream", {**name, "text_input": "a", "parameters": parameters}
            ) as response:
                assert response.read(1)
                stops = list(pool.map(lambda _, n=name: daemon.post(f"{path}/stopInfer", n), range(8)))
                response.read()
            assert {answer.status for answer in stops} <= {200, 404}
            assert any(answer.status == 200 for answer in stops)


def test_an_adapter_of_no_numbers_spoils_nobody_elses_answer(
    daemon: Daemon, texts: list[str], tmp_path: Path
) -> None:
    """Neither in the same batch nor in the cache blocks that it leaves behind."""
    folder = tmp_path / "nan"
    write_adapter(TINY_MODEL, folder, rank=8, strength=0.5, seed=0)
    weights = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(t, float("nan")) for name, t in load_file(weights).items()}, weights)
    assert adapters(daemon, "load", lora_name="nan", lora_path=str(folder)).status == 200
    spoilt = completion(model="nan", prompt="x " * 400)
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(daemon.post, "/v1/completions", spoilt) for _ in range(4)]
        good = list(pool.map(lambda prompt: text(daemon, prompt), PROMPTS))
        assert {future.result().status for future in bad} == {500}
    assert good == texts
    assert [text(daemon, prompt) for prompt in PROMPTS] == texts
    assert adapters(daemon, "unload", lora_name="nan").status == 200


def test_trials_of_a_hundred_operators(daemon: Daemon, texts: list[str]) -> None:
    with ThreadPoolExecutor(20) as pool:
        trials = [pool.submit(daemon.manage, "/health/timed-60") for _ in range(100)]
        assert [text(daemon, prompt) for prompt in PROMPTS] == texts
        assert {trial.result().status for trial in trials} == {200}
