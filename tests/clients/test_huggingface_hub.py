"""huggingface_hub's InferenceClient, unmodified: text generation goes to `POST /`, chat to OpenAI's path."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2
import jsonschema
import pytest
from huggingface_hub import InferenceClient, close_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, TextGenerationError

from tests.harness import HOST, Daemon

MODEL = "mindie-tiny"
PROMPT = "Once upon a time"
STORY = [{"role": "user", "content": "Tell me a short story about a brave cat."}]


@pytest.fixture(scope="module")
def client(server: Daemon) -> Iterator[InferenceClient]:
    with InferenceClient(base_url=f"http://{HOST}:{server.port}", api_key="anything", timeout=60) as client:
        yield client
    close_session()


# -- text generation ---------------------------------------------------------------------------------


def test_text_whole_and_streamed(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=20)
    assert isinstance(whole, str) and whole
    pieces = list(client.text_generation(PROMPT, max_new_tokens=20, stream=True))
    assert len(pieces) == 20 and "".join(pieces) == whole


def test_details_whole_and_streamed(client: InferenceClient) -> None:
    whole = client.text_generation(
        PROMPT, max_new_tokens=20, details=True, decoder_input_details=True, do_sample=True, seed=7
    )
    assert whole.details is not None and whole.details.seed == 7
    assert whole.details.finish_reason == "length" and whole.details.generated_tokens == 20
    assert len(whole.details.tokens) == 20 and len(whole.details.prefill) > 1
    stream = client.text_generation(
        PROMPT, max_new_tokens=20, details=True, do_sample=True, seed=7, stream=True
    )
    *events, last = stream
    assert all(event.generated_text is None and event.details is None for event in events)
    assert last.generated_text == whole.generated_text
    assert last.details is not None and last.details.generated_tokens == len(events) + 1 == 20
    assert last.details.finish_reason == "length" and last.details.seed == 7
    assert "".join(event.token.text for event in [*events, last]) == whole.generated_text


def test_return_full_text(client: InferenceClient) -> None:
    text = client.text_generation(PROMPT, max_new_tokens=5)
    full = client.text_generation(PROMPT, max_new_tokens=5, return_full_text=True)
    assert full.startswith(PROMPT) and full.endswith(text) and len(full) > len(text) + len(PROMPT) - 1


def test_every_parameter_the_client_knows(client: InferenceClient) -> None:
    text = client.text_generation(
        PROMPT,
        max_new_tokens=10,
        adapter_id=MODEL,
        best_of=1,
        do_sample=True,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        seed=1,
        stop=["\0"],
        temperature=0.7,
        top_k=10,
        top_n_tokens=2,
        top_p=0.9,
        truncate=3,
        typical_p=0.9,
        watermark=False,
    )
    assert isinstance(text, str)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_parameter_is_told(client: InferenceClient, stream: bool) -> None:
    with pytest.raises(TextGenerationError, match="temperature"):
        list(client.text_generation(PROMPT, temperature=-1.0, stream=stream))


# -- chat --------------------------------------------------------------------------------------------


def test_chat_whole_and_streamed(client: InferenceClient) -> None:
    whole = client.chat_completion(STORY, model=MODEL, max_tokens=30)
    assert whole.model == MODEL and whole.usage.completion_tokens == 30
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.chat_completion(
            STORY, model=MODEL, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30


def test_chat_the_openai_way(client: InferenceClient) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=8, logprobs=True, top_logprobs=2, temperature=0.5, seed=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 8


def test_chat_with_a_json_schema(client: InferenceClient) -> None:
    """The client turns a JSON schema into TGI's `json_object` with the schema as `value`."""
    few = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"cats": few}, "required": ["cats"]}
    answer = client.chat_completion(
        STORY,
        model=MODEL,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "cats", "schema": schema}},
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop" and choice.message.content is not None
    jsonschema.validate(json.loads(choice.message.content), schema)


def test_chat_with_a_required_tool(client: InferenceClient) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Bern", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    answer = client.chat_completion(
        STORY,
        model=MODEL,
        tools=[tool],
        tool_choice="required",
        max_tokens=100,
        extra_body={"parallel_tool_calls": False},
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls is not None
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Paris")


def test_chat_error(client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="top_p"):
        client.chat_completion(STORY, model=MODEL, top_p=3.0)


# -- mutual TLS --------------------------------------------------------------------------------------


def test_mutual_tls(https_server: Daemon) -> None:
    set_client_factory(lambda: httpx2.Client(verify=https_server.tls(), timeout=60))
    try:
        client = InferenceClient(base_url=f"https://{HOST}:{https_server.port}", api_key="anything")
        pieces = list(client.text_generation(PROMPT, max_new_tokens=5, stream=True))
        assert "".join(pieces) == client.text_generation(PROMPT, max_new_tokens=5)
        answer = client.chat_completion(STORY, model="llama", max_tokens=5)
        assert answer.choices[0].message.content
    finally:
        set_client_factory(httpx2.Client)
        close_session()
