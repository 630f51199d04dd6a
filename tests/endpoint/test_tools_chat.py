"""Tools and reasoning in POST /v1/chat/completions: what is asked of the model, frames and whole answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from endpoint.protocols.base import (
    NO_TOKEN,
    Body,
    ChatFormat,
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    ModelInfo,
)
from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.protocols.openai_chat_calls import PartedChatReply
from endpoint.reasoning import Opening
from engine.errors import InvalidRequest
from tests.endpoint.samples import completion, context, interleaved, model_info, payload, steps, stream

ADAPTER = OpenAIChat()
MESSAGES = [{"role": "user", "content": "Weather?"}]


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


WEATHER = tool("weather", type="object", properties={"city": {"type": "string"}}, required=["city"])
CLOCK = tool("clock")
TOOLS: Body = {"tools": [WEATHER, CLOCK]}
CALLS = (
    'Look: <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


def model(tools: str = "hermes", reasoning: bool = False) -> ModelInfo:
    return replace(model_info(), chat=ChatFormat(tools=tools, reasoning=reasoning))


def parse(info: ModelInfo | None = None, **members: Any) -> GenerationRequest:
    return ADAPTER.parse({"model": "llama", "messages": MESSAGES, **members}, info or model(), {})


def prompt_of(**members: Any) -> ChatPrompt:
    prompt = parse(**members).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


def reply(
    body: Body, info: ModelInfo | None = None, opening: Opening = Opening.NOBODY, full_text: bool = False
) -> Any:
    given = replace(context(full_text=full_text), model=info or model(), opening=opening)
    return ADAPTER.reply(parse(info, **body), body, given)


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def deltas(frames: Sequence[str]) -> list[dict[str, Any]]:
    return [payload(frame)["choices"][0]["delta"] for frame in frames[:-1]]


def joined(frames: Sequence[str]) -> dict[str, Any]:
    """A message put together as clients do it."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas(frames):
        assert delta["role"] == "assistant" and None not in delta.values()
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name, "")
        for entry in delta.get("tool_calls", []):
            if "id" in entry:
                assert entry["index"] == len(message["tool_calls"]) and entry["type"] == "function"
                assert re.fullmatch(r"call_[0-9A-Za-z]{8}", entry["id"])
                message["tool_calls"].append([entry["function"]["name"], ""])
            else:
                assert entry.keys() == {"index", "function"}
            message["tool_calls"][entry["index"]][1] += entry["function"]["arguments"]
    return message


def whole(body: Body, pieces: Sequence[str], finish: FinishReason = FinishReason.EOS, **options: Any) -> Any:
    answer = json.loads(reply(body, **options).result([completion_of(pieces, finish)]))
    return answer["choices"][0]


def completion_of(pieces: Sequence[str], finish: FinishReason = FinishReason.EOS) -> Any:
    of = steps(pieces, finish=finish)
    return replace(completion(of), pieces=[step.text for step in of])


# -- what is asked of the model ----------------------------------------------------------------------


def test_tools_are_shown_unless_they_are_not_wanted() -> None:
    assert list(prompt_of(**TOOLS).tools) == [WEATHER, CLOCK]
    assert list(prompt_of(**TOOLS, tool_choice="auto").tools) == [WEATHER, CLOCK]
    assert list(prompt_of(**TOOLS, tool_choice="required").tools) == [WEATHER, CLOCK]
    assert not prompt_of(**TOOLS, tool_choice="none").tools
    assert list(prompt_of(**TOOLS, tool_choice=tool("clock")).tools) == [CLOCK]
    assert not prompt_of(**TOOLS, tool_choice=tool("other")).tools
    assert not prompt_of(tool_choice="required").tools and not prompt_of(tools=[]).tools


def test_only_a_wanted_call_binds_the_answer() -> None:
    assert not parse(**TOOLS).sampling.grammar
    assert not parse(**TOOLS, tool_choice=tool("other")).sampling.grammar
    assert not parse(tool_choice="required").sampling.grammar
    both = parse(**TOOLS, tool_choice="required").sampling.grammar
    assert "weather" in both and "clock" in both
    one = parse(**TOOLS, tool_choice=tool("clock")).sampling.grammar
    assert "clock" in one and "weather" not in one


def test_without_tools_and_reasoning_nothing_is_looked_for() -> None:
    for body in ({}, {**TOOLS, "tool_choice": "none"}, {**TOOLS, "tool_choice": tool("other")}):
        assert not isinstance(reply(body), PartedChatReply)
        assert not parse(**body).markers
    assert isinstance(reply(TOOLS), PartedChatReply)
    assert isinstance(reply({}, model(reasoning=True)), PartedChatReply)


@pytest.mark.parametrize("form", ["hermes", "llama3", "deepseek_v3"])
def test_the_formats_markers_stay_in_the_text(form: str) -> None:
    markers = parse(model(form), **TOOLS).markers
    assert markers and all(marker.startswith("<") for marker in markers)
    assert set(parse(model(form, reasoning=True), **TOOLS).markers) == {*markers, "<think>", "</think>"}


FUNCTION = {"name": "f"}
BAD_TOOLS: list[Any] = [
    {}, "x", 1, [1], [None], [{}], [{"type": "code", "function": FUNCTION}], [{"function": FUNCTION}],
    [{"type": "function"}], [{"type": "function", "function": []}], [{"type": "function", "function": {}}],
    [{"type": "function", "function": {"name": 1}}], [{"type": "function", "function": {"name": ""}}],
    [{"type": "function", "function": {"name": "a b"}}],
    [{"type": "function", "function": {"name": "a" * 65}}],
    [{"type": "function", "function": {**FUNCTION, "parameters": []}}],
]  # fmt: skip
BAD_CHOICES: list[Any] = [
    "maybe", "", 1, True, [], {}, {"type": "function"}, {"type": "function", "function": {"name": "ä"}},
    {"type": "code", "function": FUNCTION},
]  # fmt: skip


@pytest.mark.parametrize("tools", BAD_TOOLS)
def test_a_bad_tool_list_is_refused(tools: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"`tools"):
        parse(tools=tools)


@pytest.mark.parametrize("choice", BAD_CHOICES)
def test_a_bad_choice_is_refused(choice: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"`tool_choice"):
        parse(**TOOLS, tool_choice=choice)


@pytest.mark.parametrize("name", ["a", "A-z_0", "天气", "a" * 64])
def test_legal_names(name: str) -> None:
    assert prompt_of(tools=[tool(name)]).tools


def test_what_cannot_be_combined_with_a_forced_call() -> None:
    for choice in ("required", tool("clock")):
        with pytest.raises(InvalidRequest, match=r"`tool_choice`.*use_beam_search"):
            parse(**TOOLS, tool_choice=choice, use_beam_search=True)
    parse(**TOOLS, use_beam_search=True)
    with pytest.raises(InvalidRequest, match=r"`tools\[0\].function.parameters.type`"):
        parse(tools=[tool("f", type="string")], tool_choice="required")
    parse(tools=[tool("f", type="string")])


def test_a_budget_needs_reasoning_and_thinking_switched_on() -> None:
    asked = {"thinking_budget": 5}
    thinking = {**asked, "enable_thinking": True}
    info = model(reasoning=True)
    assert parse(info, chat_template_kwargs=thinking).sampling.thinking_budget == 5
    assert parse(info, chat_template_kwargs=asked).sampling.thinking_budget == 0
    off = {**asked, "enable_thinking": False}
    assert parse(info, chat_template_kwargs=off).sampling.thinking_budget == 0
    assert parse(chat_template_kwargs=thinking).sampling.thinking_budget == 0
    assert parse(info).reasoning and not parse().reasoning


# -- calls in answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_stream_and_a_whole_answer_have_the_same_calls(size: int) -> None:
    pieces = cut(CALLS, size)
    frames = stream(reply(TOOLS), steps(pieces, finish=FinishReason.EOS))
    expected = [["weather", '{"city": "Paris"}'], ["clock", "{}"]]
    assert joined(frames) == {"content": "Look: ", "reasoning_content": "", "tool_calls": expected}
    last = payload(frames[-2])
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["usage"]["completion_tokens"] == len(pieces)
    assert all(payload(f)["choices"][0]["finish_reason"] is None for f in frames[:-2])
    choice = whole(TOOLS, pieces)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "Look: ")
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message["tool_calls"]]
    assert calls == expected and "reasoning_content" not in message
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert all(re.fullmatch(r"call_[0-9A-Za-z]{8}", call["id"]) for call in message["tool_calls"])


def test_the_first_delta_of_a_call_has_its_name_and_no_arguments() -> None:
    found = deltas(stream(reply(TOOLS), steps([*cut(CALLS, 1), ""], finish=FinishReason.EOS)))
    entries = [delta["tool_calls"] for delta in found if "tool_calls" in delta]
    assert all(len(of_frame) == 1 for of_frame in entries)
    begins = [entry for (entry,) in entries if "id" in entry]
    assert [set(entry) for entry in begins] == [{"index", "id", "type", "function"}] * 2
    assert [entry["function"] for entry in begins] == [
        {"name": "weather", "arguments": ""},
        {"name": "clock", "arguments": ""},
    ]
    fragments = [entry["function"]["arguments"] for (entry,) in entries if entry["index"] == 0]
    assert fragments[1:3] == ['{"', "c"] and "".join(fragments) == '{"city": "Paris"}'


def test_every_token_has_a_frame() -> None:
    pieces = cut(CALLS, 4)
    assert len(stream(reply(TOOLS), steps(pieces))) == len(pieces) + 1


def test_only_one_call_when_not_parallel() -> None:
    body = {**TOOLS, "parallel_tool_calls": False}
    for pieces in (cut(CALLS, 1), [CALLS]):
        message = joined(stream(reply(body), steps(pieces)))
        assert message["tool_calls"] == [["weather", '{"city": "Paris"}']]
        assert len(whole(body, pieces)["message"]["tool_calls"]) == 1


def test_text_without_calls_is_content() -> None:
    for text in ("Hi.", '{"name": "weather"}', "a <tool", "<tool_call>no</tool_call>"):
        frames = stream(reply(TOOLS), steps(cut(text, 1), finish=FinishReason.EOS))
        assert joined(frames) == {"content": text, "reasoning_content": "", "tool_calls": []}
        choice = whole(TOOLS, cut(text, 1))
        assert (choice["message"]["content"], choice["message"]["tool_calls"]) == (text, [])
        assert choice["finish_reason"] == "stop" == payload(frames[-2])["choices"][0]["finish_reason"]


CUT_OFF = '<tool_call>{"name": "weather", "arguments": {"city": "Pa'


@pytest.mark.parametrize(
    ("text", "finish", "worded", "num_calls"),
    [
        (CALLS, FinishReason.LENGTH, "tool_calls", 2),
        (CALLS, FinishReason.STOP, "tool_calls", 2),
        (CUT_OFF, FinishReason.LENGTH, "length", 0),
        (CUT_OFF, FinishReason.STOP, "stop", 0),
        (CALLS + CUT_OFF, FinishReason.LENGTH, "length", 2),
        (CALLS + CUT_OFF, FinishReason.EOS, "tool_calls", 2),
        (CALLS.removesuffix("}\n</tool_call>"), FinishReason.LENGTH, "tool_calls", 2),
        ("Hi", FinishReason.LENGTH, "length", 0),
    ],
)
def test_only_complete_calls_count(text: str, finish: FinishReason, worded: str, num_calls: int) -> None:
    frames = stream(reply(TOOLS), steps(cut(text, 3), finish=finish))
    assert payload(frames[-2])["choices"][0]["finish_reason"] == worded
    choice = whole(TOOLS, cut(text, 3), finish)
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == (worded, num_calls)
    if text.endswith(CUT_OFF):  # it was sent already, in a stream; a whole answer can still have it as text
        assert joined(frames)["tool_calls"][-1] == ["weather", '{"city": "Pa']
        assert choice["message"]["content"].endswith(CUT_OFF)


def test_every_choice_has_its_own_calls() -> None:
    body = {**TOOLS, "n": 2, "temperature": 1.0}
    frames = stream(reply(body), interleaved([steps(cut(CALLS, 2)), steps(cut("No calls, " * 9, 2))]))
    of_choice: list[list[str]] = [[], []]
    for frame in frames[:-1]:
        of_choice[payload(frame)["choices"][0]["index"]].append(frame)
    assert len(joined([*of_choice[0], ""])["tool_calls"]) == 2
    assert joined([*of_choice[1], ""]) == {
        "content": "No calls, " * 9, "reasoning_content": "", "tool_calls": [],
    }  # fmt: skip


def test_full_text_frames_repeat_the_content_only() -> None:
    frames = stream(reply(TOOLS, full_text=True), steps(cut(CALLS, 3)))
    contents = [delta["content"] for delta in deltas(frames) if "content" in delta]
    assert contents[1] == "Look: " == contents[-1] and payload(frames[-2])["full_text"] == "Look: "
    entries = [entry for delta in deltas(frames) for entry in delta.get("tool_calls", [])]
    first = "".join(entry["function"]["arguments"] for entry in entries if entry["index"] == 0)
    assert first == '{"city": "Paris"}'


def test_logprobs_stay_with_their_tokens() -> None:
    body = {**TOOLS, "logprobs": True}
    of = steps(["<tool_call>", "x"], logprobs=[("<tool_call>", -0.5, []), ("x", -1.0, [])])
    frames = stream(reply(body), of)
    tokens = [payload(f)["choices"][0]["logprobs"]["content"][0]["token"] for f in frames[:-1]]
    assert tokens == ["<tool_call>", "x"]


def test_a_beam_is_one_frame_with_all_its_calls() -> None:
    body = {**TOOLS, "n": 2, "use_beam_search": True, "stream": True}
    beams = [completion_of(cut(CALLS, 2)), completion_of(["Hi"])]
    frames = [frame.decode() for frame in reply(body).beam_frames(beams)]
    assert joined([frames[0], ""])["tool_calls"] == [["weather", '{"city": "Paris"}'], ["clock", "{}"]]
    assert joined([frames[1], ""])["content"] == "Hi"
    assert [payload(f)["choices"][0]["finish_reason"] for f in frames] == ["tool_calls", "stop"]


# -- reasoning in answers ----------------------------------------------------------------------------

THINKS = ["<think>", "\n", "hm", " hm", "</think>", "\n\n", "Yes", "."]


@pytest.mark.parametrize("opening", [Opening.MODEL, Opening.PROMPT])
def test_reasoning_comes_first_and_is_counted(opening: Opening) -> None:
    pieces = THINKS if opening is Opening.MODEL else THINKS[2:]
    options: Any = {"info": model(reasoning=True), "opening": opening}
    frames = stream(reply({}, **options), steps(pieces, finish=FinishReason.EOS))
    assert joined(frames) == {"content": "Yes.", "reasoning_content": "hm hm", "tool_calls": []}
    kinds = ["reasoning_content" in delta for delta in deltas(frames)]
    assert kinds == sorted(kinds, reverse=True) and len(frames) == len(pieces) + 1
    spent = pieces.index("</think>") + 1
    usage = payload(frames[-2])["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": spent}
    answer = json.loads(reply({}, **options).result([completion_of(pieces)]))
    message = answer["choices"][0]["message"]
    assert message == {
        "role": "assistant", "content": "Yes.", "reasoning_content": "hm hm", "tool_calls": [],
    }  # fmt: skip
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": spent}


def test_reasoning_that_never_ends_is_no_content() -> None:
    options: Any = {"info": model(reasoning=True), "opening": Opening.PROMPT}
    frames = stream(reply({}, **options), steps(["a", "b"]))
    assert joined(frames) == {"content": "", "reasoning_content": "ab", "tool_calls": []}
    message = whole({}, ["a", "b"], **options)["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "ab")


def test_without_reasoning_there_is_an_empty_string() -> None:
    message = whole({}, ["a", "b"], info=model(reasoning=True), opening=Opening.NOBODY)["message"]
    assert (message["content"], message["reasoning_content"]) == ("ab", "")


def test_totals_of_reasoning_are_over_all_choices() -> None:
    body = {"n": 2, "temperature": 1.0, "stream_options": {"include_usage": True}}
    options: Any = {"info": model(reasoning=True), "opening": Opening.MODEL}
    frames = stream(reply(body, **options), interleaved([steps(THINKS), steps(["No"])]))
    assert payload(frames[-2])["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    assert all("usage" not in payload(frame) for frame in frames[:-2])


def test_calls_in_reasoning_are_thoughts() -> None:
    options: Any = {"info": model(reasoning=True), "opening": Opening.MODEL}
    text = f"<think>{CALLS}</think>\n{CALLS}"
    message = joined(stream(reply(TOOLS, **options), steps(cut(text, 3))))
    assert (message["reasoning_content"], message["content"]) == (CALLS, "Look: ")
    assert len(message["tool_calls"]) == 2


def test_a_cancelled_answer_gives_out_what_was_held_back() -> None:
    of = steps(["Hi ", "<tool"], finish=FinishReason.CANCELLED)
    gone = replace(of[-1], token_id=NO_TOKEN, text="", index=2)
    of = [of[0], replace(of[1], finish=None), gone]
    frames = stream(reply(TOOLS), of)
    assert joined(frames)["content"] == "Hi <tool"
    assert payload(frames[-2])["usage"]["completion_tokens"] == 2
