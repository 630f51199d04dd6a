"""The openai SDK, unmodified: chat, completions, errors, many streams."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from tests.harness import HOST, Daemon, eventually

MODEL = "mindie-tiny"
WHO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who are you?"}]
STORY: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me a short story about a brave cat."}]},
]
PROMPT = "Once upon a time"


def slots_in_use(server: Daemon) -> int:
    count = server.manage(f"/v2/models/{MODEL}/getSlotCount").json()
    used: int = count["total_slots"] - count["free_slots"]
    return used


# -- models ------------------------------------------------------------------------------------------


def test_models(sdk: openai.OpenAI) -> None:
    first, *_ = sdk.models.list()
    assert first.id == MODEL and first.object == "model" and first.created > 0
    assert sdk.models.retrieve(MODEL) == first
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("no-such-model")


# -- chat --------------------------------------------------------------------------------------------


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model=MODEL, messages=WHO, max_tokens=40)
    assert answer.object == "chat.completion" and answer.model == MODEL
    [choice] = answer.choices
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    assert choice.message.role == "assistant" and choice.message.content
    assert not choice.message.tool_calls
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    # what the server adds to OpenAI's answer reaches the user too
    assert len(answer.usage.model_dump()["batch_size"]) == answer.usage.completion_tokens


def test_max_completion_tokens_counts_like_max_tokens(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model=MODEL, messages=STORY, max_completion_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("include_usage", [True, False])
def test_chat_stream_says_the_same(sdk: openai.OpenAI, include_usage: bool) -> None:
    whole = sdk.chat.completions.create(model=MODEL, messages=STORY, max_tokens=60)
    with sdk.chat.completions.create(
        model=MODEL,
        messages=STORY,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": include_usage},
    ) as stream:
        chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id != whole.id
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content
    *_, finish = (choice for chunk in chunks for choice in chunk.choices)
    assert finish.finish_reason == whole.choices[0].finish_reason
    assert text_of(chunks)[0] == whole.choices[0].message.content
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    assert with_usage == chunks[-1:] and bool(chunks[-1].choices) is not include_usage
    assert whole.usage is not None and chunks[-1].usage is not None
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, key) == getattr(whole.usage, key)


def text_of(chunks: list[ChatCompletionChunk]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts


def test_the_stream_helper_builds_the_whole_answer(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model=MODEL, messages=WHO, logprobs=True)
    with sdk.chat.completions.stream(
        model=MODEL, messages=WHO, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert final.usage is not None and whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_n_choices_whole_and_streamed(sdk: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return sdk.chat.completions.create(
            model=MODEL, messages=STORY, max_tokens=24, n=3, temperature=1.0, seed=11, **more
        )

    whole: ChatCompletion = ask()
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert list(texts) == [0, 1, 2] and len(set(texts.values())) == 3
    chunks = list(ask(stream=True))
    assert text_of(chunks) == texts
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == [0, 1, 2]


def test_seed_repeats(sdk: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        answer = sdk.chat.completions.create(
            model=MODEL, messages=STORY, max_tokens=30, temperature=1.0, top_p=0.95, seed=seed
        )
        return answer.choices[0].message.content

    assert ask(5) == ask(5)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_stop_string(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model=MODEL, messages=STORY, max_tokens=40).choices[0]
    assert whole.message.content
    word = whole.message.content.split()[4]
    cut = sdk.chat.completions.create(model=MODEL, messages=STORY, max_tokens=40, stop=["\0", word])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole.message.content.partition(word)[0]


def test_chat_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12
    assert (
        b"".join(bytes(entry.bytes or ()) for entry in entries).decode() == answer.choices[0].message.content
    )
    for entry in entries:
        assert [entry.token, entry.logprob] == [entry.top_logprobs[0].token, entry.top_logprobs[0].logprob]
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0 + 1e-3


def test_logit_bias_reaches_the_sampler(sdk: openai.OpenAI) -> None:
    banned = sdk.chat.completions.create(
        model=MODEL, messages=WHO, max_tokens=1, logprobs=True, logit_bias={"300": 100}
    )
    plain = sdk.chat.completions.create(model=MODEL, messages=WHO, max_tokens=1)
    assert banned.choices[0].message.content != plain.choices[0].message.content


# -- completions -------------------------------------------------------------------------------------


def test_completions_whole_and_streamed(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, logprobs=2)
    assert whole.object == "text_completion" and whole.usage is not None
    [choice] = whole.choices
    assert choice.finish_reason == "length" and whole.usage.completion_tokens == 20
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset or ()) == 20
    stream = sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completions_of_token_ids_and_best_of(sdk: openai.OpenAI) -> None:
    ids = sdk.completions.create(model=MODEL, prompt=[300, 301, 302], max_tokens=4)
    assert ids.usage is not None and ids.usage.prompt_tokens == 3
    best = sdk.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, n=1, best_of=3, temperature=1.0, seed=1
    )
    assert len(best.choices) == 1 and best.usage is not None and best.usage.completion_tokens == 12


def test_several_prompts(sdk: openai.OpenAI) -> None:
    prompts = [PROMPT, "My name is"]
    both = sdk.completions.create(model=MODEL, prompt=prompts, max_tokens=6, n=2, temperature=0.7, seed=4)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.usage is not None
    singly = [sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=6) for prompt in prompts]
    greedy = sdk.completions.create(model=MODEL, prompt=prompts, max_tokens=6, echo=True)
    assert [choice.text for choice in greedy.choices] == [
        prompt + alone.choices[0].text for prompt, alone in zip(prompts, singly, strict=True)
    ]


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature"),
        ({"model": "gpt-5"}, openai.UnprocessableEntityError, "model"),
        ({"top_p": 2}, openai.UnprocessableEntityError, "top_p"),
        ({"messages": []}, openai.UnprocessableEntityError, "messages"),
        ({"max_tokens": 0}, openai.UnprocessableEntityError, "max_tokens"),
        ({"tools": [{"type": "function"}]}, openai.UnprocessableEntityError, "tools"),
        ({"response_format": {"type": "xml"}}, openai.UnprocessableEntityError, "response_format"),
        (
            {"messages": [{"role": "user", "content": "cat " * 3000}]},
            openai.APIStatusError,
            "maxInputTokenLen",
        ),
    ],
)
def test_errors_become_the_right_exception(
    sdk: openai.OpenAI,
    stream: bool,
    change: dict[str, Any],
    error: type[openai.APIStatusError],
    names: str,
) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": WHO, "max_tokens": 4, "stream": stream, **change}
    with pytest.raises(error) as caught:  # before the first event, although a stream was asked for
        sdk.chat.completions.create(**arguments)
    assert names in str(caught.value.body)  # the text; its own message has only the status
    assert caught.value.status_code == (422 if error is openai.UnprocessableEntityError else 424)


def test_interfaces_that_are_not_there(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model=MODEL, input="x")


# -- many, and gone ----------------------------------------------------------------------------------


def test_many_async_streams(sdk_arguments: dict[str, Any]) -> None:
    streams = 24

    async def tell(sdk: openai.AsyncOpenAI, index: int) -> tuple[str, int]:
        stream = await sdk.chat.completions.create(
            model=MODEL,
            messages=STORY,
            max_tokens=8 + index,
            temperature=1.0,
            seed=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text, tokens = "", 0
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            tokens += chunk.usage.completion_tokens if chunk.usage else 0
        return text, tokens

    async def tell_all() -> list[tuple[str, int]]:
        async with openai.AsyncOpenAI(**sdk_arguments) as sdk:
            return await asyncio.gather(*(tell(sdk, index) for index in range(streams)))

    told = asyncio.run(tell_all())
    assert [tokens for _, tokens in told] == [8 + index for index in range(streams)]
    assert all(told[-1][0].startswith(text.rstrip("\ufffd")) for text, _ in told)  # one seed, one story


def test_leaving_a_stream_frees_the_server(server: Daemon, sdk: openai.OpenAI) -> None:
    choices = 16  # one would be told within a second
    stream = sdk.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=2000, n=choices, stream=True, extra_body={"ignore_eos": True}
    )
    assert next(stream).choices
    eventually(lambda: slots_in_use(server) > 0, 10.0, "the stream has slots")
    stream.close()
    eventually(lambda: slots_in_use(server) == 0, 10.0, "the slots are free again")


# -- mutual TLS --------------------------------------------------------------------------------------


def test_mutual_tls(https_server: Daemon) -> None:
    address = f"https://{HOST}:{https_server.port}/v1"
    with openai.OpenAI(
        base_url=address, api_key="x", max_retries=0, http_client=httpx2.Client(verify=https_server.tls())
    ) as sdk:
        answer = sdk.chat.completions.create(model="llama", messages=WHO, max_tokens=5)
        assert answer.model == "llama" and answer.choices[0].message.content
