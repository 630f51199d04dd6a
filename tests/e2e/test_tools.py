"""Tools and reasoning on the running daemon. The shipped model knows of neither: it calls when forced to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from tests.harness import Daemon, Json

MakeDaemon = Callable[..., Daemon]
PATH = "/v1/chat/completions"
CHAT: Json = {"model": "mindie-tiny", "messages": [{"role": "user", "content": "Who are you?"}]}
WEATHER: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 7]}},
    "required": ["city", "days"],
}
CLOCK: Json = {"type": "object", "properties": {"zone": {"type": "boolean"}}}
END = 2  # <|im_end|>
PARAMETERS = {"weather": WEATHER, "clock": CLOCK}
TOOLS: Json = {
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in PARAMETERS.items()
    ]
}
CLOCK_ONLY: Json = {"type": "function", "function": {"name": "clock"}}
# a model that was never shown a call may write one after the other
FORCED: Json = {**CHAT, **TOOLS, "tool_choice": "required", "max_tokens": 200}


def message(server: Daemon, body: Json) -> tuple[Json, str]:
    answer = server.post(PATH, body)
    assert answer.status == 200, answer.body
    choice = answer.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


def calls(of: Json) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in of["tool_calls"]]


def streamed(server: Daemon, body: Json) -> tuple[Json, str, list[Json]]:
    """The message put together from its deltas, the finish reason, and the deltas."""
    *payloads, done = server.frames(PATH, {**body, "stream": True})
    assert done == "[DONE]"
    choices = [json.loads(payload)["choices"][0] for payload in payloads]
    joined: Json = {"role": "assistant", "content": "", "tool_calls": []}
    for delta in (choice["delta"] for choice in choices):
        assert delta["role"] == "assistant" and None not in delta.values()
        joined["content"] += delta.get("content", "")
        for entry in delta.get("tool_calls", []):
            if "id" in entry:
                assert entry["type"] == "function" and re.fullmatch(r"call_[0-9A-Za-z]{8}", entry["id"])
                joined["tool_calls"].append(
                    {"function": {"name": entry["function"]["name"], "arguments": ""}}
                )
            joined["tool_calls"][entry["index"]]["function"]["arguments"] += entry["function"]["arguments"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return joined, reasons[-1], [choice["delta"] for choice in choices]


@pytest.mark.parametrize(
    "sampling", [{}, *({"temperature": 1.5, "seed": seed} for seed in range(4))], ids=str
)
@pytest.mark.parametrize("choice", ["required", CLOCK_ONLY], ids=["required", "named"])
def test_a_forced_call_is_valid_and_streams_as_it_is(server: Daemon, choice: Any, sampling: Json) -> None:
    body = {**FORCED, "tool_choice": choice, "parallel_tool_calls": False, **sampling}
    whole, finish = message(server, body)
    ((name, arguments),) = calls(whole)
    assert finish == "tool_calls" and whole["content"] == ""
    assert name == "clock" or choice == "required"
    jsonschema.validate(json.loads(arguments), PARAMETERS[name])
    joined, finish, deltas = streamed(server, body)
    assert (calls(joined), joined["content"], finish) == (calls(whole), "", "tool_calls")
    assert sum("tool_calls" in delta for delta in deltas) > 1


def test_several_calls_unless_only_one_is_wanted(server: Daemon) -> None:
    unwilling_to_end = {"logit_bias": {str(END): -6}}
    body = {**FORCED, **unwilling_to_end, "temperature": 1.5, "n": 6, "seed": 1}
    choices = server.post(PATH, body).json()["choices"]
    assert max(len(choice["message"]["tool_calls"]) for choice in choices) > 1
    for choice in choices:
        for name, arguments in calls(choice["message"]):
            jsonschema.validate(json.loads(arguments), PARAMETERS[name])
    single = server.post(PATH, {**body, "parallel_tool_calls": False}).json()["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in single] == [1] * 6
    assert [choice["finish_reason"] for choice in single] == ["tool_calls"] * 6


def test_a_call_that_was_cut_off_does_not_count(server: Daemon) -> None:
    body = {**FORCED, "max_tokens": 30}
    whole, finish = message(server, body)
    assert (whole["tool_calls"], finish) == ([], "length")
    assert whole["content"].startswith('<tool_call>\n{"name": "')
    _, finish, _ = streamed(server, body)
    assert finish == "length"


def test_beams_may_be_searched_for_calls(server: Daemon) -> None:
    body = {**CHAT, **TOOLS, "use_beam_search": True, "n": 2, "max_tokens": 8}
    whole = [choice["message"] for choice in server.post(PATH, body).json()["choices"]]
    assert all(of["content"] and of["tool_calls"] == [] for of in whole)
    *payloads, _ = server.frames(PATH, {**body, "stream": True})
    beams = [json.loads(payload)["choices"][0]["delta"]["content"] for payload in payloads]
    assert beams == [of["content"] for of in whole]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_an_answer_without_calls_is_content(server: Daemon, choice: str | None) -> None:
    body = {**CHAT, **TOOLS, "tool_choice": choice, "max_tokens": 24}
    whole, finish = message(server, body)
    assert whole["content"] and whole["tool_calls"] == [] and finish in ("stop", "length")
    joined, finish_too, _ = streamed(server, body)
    assert (joined["content"], joined["tool_calls"], finish_too) == (whole["content"], [], finish)


def test_the_model_is_shown_the_tools_that_may_be_called(server: Daemon) -> None:
    def prompt_tokens(**members: Any) -> int:
        return int(server.post(PATH, {**CHAT, "max_tokens": 1, **members}).json()["usage"]["prompt_tokens"])

    bare, both = prompt_tokens(), prompt_tokens(**TOOLS)
    assert prompt_tokens(**TOOLS, tool_choice="none") == bare < both
    assert bare < prompt_tokens(**TOOLS, tool_choice=CLOCK_ONLY) < both
    unknown = {"type": "function", "function": {"name": "unknown"}}
    assert prompt_tokens(**TOOLS, tool_choice=unknown) == bare


def test_a_whole_round_with_a_tool(server: Daemon) -> None:
    asked, _ = message(server, {**FORCED, "tool_choice": CLOCK_ONLY})
    messages = [
        *CHAT["messages"],
        {**asked, "content": None},
        {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "12:00"},
    ]
    answer, finish = message(server, {**CHAT, **TOOLS, "messages": messages, "max_tokens": 8})
    assert isinstance(answer["content"], str) and finish in ("stop", "length")


FUNCTION = {"name": "f"}
REFUSED: list[tuple[str, Json]] = [
    ("tools", {"tools": {}}),
    ("tools[0].type", {"tools": [{"function": FUNCTION}]}),
    ("tools[0].type", {"tools": [{"type": "code", "function": FUNCTION}]}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tools[0].function", {"tools": [{"type": "function", "function": "f"}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": 5}}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a.b"}}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a" * 65}}]}),
    ("tool_choice", {**TOOLS, "tool_choice": "always"}),
    ("tool_choice", {**TOOLS, "tool_choice": 1}),
    ("tool_choice.type", {**TOOLS, "tool_choice": {"function": FUNCTION}}),
    ("tool_choice.function.name", {**TOOLS, "tool_choice": {"type": "function", "function": {"name": ""}}}),
    ("parallel_tool_calls", {**TOOLS, "parallel_tool_calls": "no"}),
    ("tool_choice", {**TOOLS, "tool_choice": "required", "use_beam_search": True}),
    ("tool_choice", {**TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(server: Daemon, stream: bool) -> None:
    for field, members in REFUSED:
        answer = server.post(PATH, {**CHAT, **members, "stream": stream})
        assert answer.status == 422, (members, answer.body)
        assert f"`{field}`" in answer.json()["error"], answer.body
    message(server, {**CHAT, "max_tokens": 1})


THINKING = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- elif enable_thinking is defined %}{{- '<think>\\n' }}{% endif %}"""
BUDGET = 7


def test_reasoning_is_told_apart_and_bounded(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    (daemon.root / "think.jinja").write_text(THINKING, encoding="utf-8")
    config = daemon.root / "conf" / "config.json"
    document = json.loads(config.read_text(encoding="utf-8"))
    (model,) = document["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]
    parser = {"tool_call_parser": "deepseek_v3"}
    model["models"] = {
        "qwen2": {"enable_reasoning": True, "chat_template": "think.jinja", "tool_call_options": parser}
    }
    config.write_text(json.dumps(document), encoding="utf-8")
    daemon.start().wait_ready()

    thinks = {"enable_thinking": True, "thinking_budget": BUDGET}
    body = {**CHAT, "max_tokens": 40, "ignore_eos": True, "chat_template_kwargs": thinks}
    answer = daemon.post(PATH, body).json()
    whole, spent = answer["choices"][0]["message"], answer["usage"]["completion_tokens_details"]
    assert whole["reasoning_content"] and whole["content"] and "think>" not in json.dumps(whole)
    assert BUDGET < spent["reasoning_tokens"] < 40  # the budget, and what `</think>` takes

    *payloads, _ = daemon.frames(PATH, {**body, "stream": True})
    deltas = [json.loads(payload)["choices"][0]["delta"] for payload in payloads]
    kinds = ["content" in delta for delta in deltas]
    assert kinds == sorted(kinds)
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == whole[name]
    assert json.loads(payloads[-1])["usage"]["completion_tokens_details"] == spent

    off = daemon.post(PATH, {**body, "chat_template_kwargs": {"enable_thinking": False}}).json()
    assert off["choices"][0]["message"]["reasoning_content"] == ""
    assert off["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}

    # a forced call, in the configured format, comes after the reasoning, or at once where there is none
    forced = {**FORCED, "tool_choice": CLOCK_ONLY}
    for kwargs, reasons in ((thinks, True), ({"enable_thinking": False}, False)):
        called, finish = message(daemon, {**forced, "chat_template_kwargs": kwargs})
        assert ([name for name, _ in calls(called)], finish) == (["clock"], "tool_calls")
        assert bool(called["reasoning_content"]) == reasons and called["content"] == ""
    # where the prompt leaves it to the model, reasoning is begun for it: this model never ends it by itself
    called, finish = message(daemon, {**forced, "max_tokens": 20})
    assert called["reasoning_content"] and (called["tool_calls"], finish) == ([], "length")
    assert daemon.stop() == 0
