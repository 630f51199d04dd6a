"""The openai SDK, unmodified: answers that follow a schema, and calls of tools."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, Field

MODEL = "mindie-tiny"
WHO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who are you?"}]
STORY: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tell me a short story about a brave cat."}
]


class Animal(BaseModel):
    """So small that a model which means nothing by it comes to an end."""

    kind: Literal["cat", "dog"]
    lives: int = Field(ge=1, le=9)


def function(name: str, **properties: Any) -> ChatCompletionToolParam:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


TOOLS = [
    function(
        "get_weather", city={"enum": ["Bern", "Paris"]}, days={"type": "integer", "minimum": 1, "maximum": 9}
    ),
    function("get_time", zone={"enum": ["UTC", "CET"]}),
]


# -- structured output -------------------------------------------------------------------------------


def test_parse_into_a_pydantic_model(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(model=MODEL, messages=STORY, response_format=Animal, max_tokens=500)
    [choice] = answer.choices
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Animal)
    assert choice.message.content is not None
    assert Animal.model_validate_json(choice.message.content) == choice.message.parsed


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_json_schema_holds_for_every_choice(sdk: openai.OpenAI, temperature: float) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL,
        messages=STORY,
        max_tokens=500,
        n=3 if temperature else 1,
        temperature=temperature,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "animal", "schema": Animal.model_json_schema(), "strict": True},
        },
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        Animal.model_validate_json(choice.message.content or "")


def test_structured_stream_helper(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model=MODEL, messages=STORY, response_format=Animal, max_tokens=500
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Animal)
    assert len(deltas) > 1 and Animal.model_validate_json("".join(deltas)) == final.choices[0].message.parsed


def test_json_object(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=100, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


# -- tools -------------------------------------------------------------------------------------------


def check_call(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "get_weather":
        assert set(given) == {"city", "days"} and given["city"] in ("Bern", "Paris")
        assert 1 <= given["days"] <= 9
    else:
        assert name == "get_time" and given in ({"zone": "UTC"}, {"zone": "CET"})


CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "get_time"}}]


@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named"])
def test_forced_tool_call(sdk: openai.OpenAI, choice: Any) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL,
        messages=STORY,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=200,
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content == ""
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    check_call(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "get_time"


@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named"])
def test_streamed_tool_call(sdk: openai.OpenAI, choice: Any) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": STORY,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
    }
    pieces: list[str] = []
    first = None
    finish = None
    for chunk in sdk.chat.completions.create(**arguments, stream=True):
        for streamed in chunk.choices:
            finish = streamed.finish_reason or finish
            for delta in streamed.delta.tool_calls or []:
                assert delta.index == 0 and delta.function is not None
                if first is None:
                    first = delta
                    assert delta.id and delta.type == "function"
                else:
                    assert delta.id is None and delta.function.name is None
                pieces.append(delta.function.arguments or "")
    assert finish == "tool_calls" and first is not None and first.function is not None
    assert len(pieces) > 2, "arguments come as they are generated, not at the end"
    check_call(first.function.name or "", "".join(pieces))
    [call] = sdk.chat.completions.create(**arguments).choices[0].message.tool_calls or []
    assert [call.function.name, call.function.arguments] == [first.function.name, "".join(pieces)]


def test_several_calls_and_the_stream_helper(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model=MODEL, messages=STORY, tools=TOOLS, tool_choice="required", max_tokens=300
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        completion = stream.current_completion_snapshot
    calls = completion.choices[0].message.tool_calls or []
    assert len(calls) >= 1 and len({call.id for call in calls}) == len(calls)
    if completion.choices[0].finish_reason == "tool_calls":
        assert [event.index for event in done] == list(range(len(calls)))
        for event in done:
            check_call(event.name, event.arguments)


def test_a_turn_with_a_tools_answer(sdk: openai.OpenAI) -> None:
    asked = sdk.chat.completions.create(
        model=MODEL,
        messages=WHO,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    message = asked.choices[0].message
    [call] = message.tool_calls or []
    turn: ChatCompletionMessageParam = message.model_dump(exclude_none=True)  # type: ignore[assignment]
    result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    for assistant in (turn, {**turn, "content": None}):
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=[*WHO, assistant, result],  # type: ignore[list-item]
            tools=TOOLS,
            tool_choice="auto",
            max_tokens=30,
        )
        assert answer.usage is not None and asked.usage is not None
        assert answer.usage.prompt_tokens > asked.usage.prompt_tokens  # both turns were shown to the model
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_tools_nobody_may_call(sdk: openai.OpenAI) -> None:
    def ask(**more: Any) -> ChatCompletion:
        return sdk.chat.completions.create(model=MODEL, messages=WHO, max_tokens=30, **more)

    silent, plain = ask(tools=TOOLS, tool_choice="none"), ask()
    assert silent.choices[0].message == plain.choices[0].message and not silent.choices[0].message.tool_calls
    assert ask(tools=[]).choices[0].message == plain.choices[0].message
