"""langchain-openai's ChatOpenAI, unmodified, against the running daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.harness import HOST, Daemon

STORY = [SystemMessage("You tell stories."), HumanMessage("Tell me a short story about a brave cat.")]


@pytest.fixture(scope="module", autouse=True)
def no_tracing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANGSMITH_TRACING", "false")
        yield


def chat(server: Daemon, **more: Any) -> ChatOpenAI:
    arguments: dict[str, Any] = {
        "model": "mindie-tiny",
        "api_key": "anything",
        "max_retries": 0,
        "timeout": 60,
    }
    return ChatOpenAI(
        **{**arguments, "base_url": f"http://{HOST}:{server.port}/v1", "max_tokens": 40, **more}
    )


class Weather(BaseModel):
    """The weather of one place."""

    city: Literal["Bern", "Paris"]
    sunny: bool


@tool
def get_weather(city: Literal["Bern", "Paris"], unit: Literal["celsius", "kelvin"]) -> str:
    """Tell the weather of a city."""
    return f"{city}: 20 {unit}"


def test_invoke(server: Daemon) -> None:
    answer = chat(server).invoke(STORY)
    assert isinstance(answer, AIMessage) and answer.text and not answer.tool_calls
    assert answer.response_metadata["finish_reason"] == "length"  # its `max_tokens` was understood
    usage = answer.usage_metadata
    assert usage is not None and usage["output_tokens"] == 40
    assert usage["total_tokens"] == usage["input_tokens"] + 40


def test_stream_counts_every_token_once(server: Daemon) -> None:
    whole = chat(server).invoke(STORY)
    total: AIMessageChunk | None = None
    for chunk in chat(server, stream_usage=True).stream(STORY):
        total = chunk if total is None else total + chunk
    assert total is not None and total.text == whole.text
    assert total.usage_metadata is not None and whole.usage_metadata is not None
    for key in ("input_tokens", "output_tokens", "total_tokens"):
        assert total.usage_metadata[key] == whole.usage_metadata[key]  # type: ignore[literal-required]


def test_usage_without_asking_is_counted_once_too(server: Daemon) -> None:
    total: AIMessageChunk | None = None
    for chunk in chat(server, stream_usage=False).stream(STORY):
        total = chunk if total is None else total + chunk
    assert total is not None and total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] == 40


def test_batch_and_async(server: Daemon) -> None:
    model = chat(server, temperature=1.0, seed=3, max_tokens=12)
    alone = model.invoke(STORY).text
    assert [answer.text for answer in model.batch([STORY] * 6)] == [alone] * 6
    assert asyncio.run(model.ainvoke(STORY)).text == alone


def test_completions(server: Daemon) -> None:
    base_url = f"http://{HOST}:{server.port}/v1"
    model = OpenAI(
        model="mindie-tiny", api_key="x", base_url=base_url, temperature=0, max_tokens=10, max_retries=0
    )
    whole = model.invoke("Once upon a time")
    assert whole and "".join(model.stream("Once upon a time")) == whole


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: Daemon, method: Literal["json_schema", "function_calling"]) -> None:
    weather = chat(server, max_tokens=500).with_structured_output(Weather, method=method).invoke(STORY)
    assert isinstance(weather, Weather)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_bound_tools(server: Daemon, choice: str, stream: bool) -> None:
    bound = chat(server, max_tokens=200).bind_tools(
        [get_weather], tool_choice=choice, parallel_tool_calls=False
    )
    if stream:
        first, *rest = bound.stream(STORY)
        answer: Any = sum(rest, start=first)
    else:
        answer = bound.invoke(STORY)
    assert answer.response_metadata["finish_reason"] == "tool_calls" and not answer.invalid_tool_calls
    [call] = answer.tool_calls
    assert call["name"] == "get_weather" and call["id"]
    assert get_weather.invoke(call["args"]).split(":")[0] in ("Bern", "Paris")


def test_the_tools_answer_is_taken(server: Daemon) -> None:
    bound = chat(server, max_tokens=200).bind_tools(
        [get_weather], tool_choice="required", parallel_tool_calls=False
    )
    asked = bound.invoke(STORY)
    result: ToolMessage = get_weather.invoke(asked.tool_calls[0])
    answer = chat(server).bind_tools([get_weather], tool_choice="none").invoke([*STORY, asked, result])
    assert answer.text and not answer.tool_calls


def test_error(server: Daemon) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        chat(server, temperature=-1.0).invoke(STORY)
    assert "temperature" in str(caught.value.body)
