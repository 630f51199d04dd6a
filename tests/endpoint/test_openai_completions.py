"""POST /v1/completions: what differs from chat."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from endpoint.protocols.base import Body, FinishReason, GenerationRequest
from endpoint.protocols.openai_completions import OpenAICompletions
from engine.errors import EngineFailed, GenerationRefused, InvalidRequest, ServerError
from tests.endpoint.samples import VOCAB, completion, context, model_info, payload, steps, stream

ADAPTER = OpenAICompletions()


def parse(**members: Any) -> GenerationRequest:
    return ADAPTER.parse({"model": "m", "prompt": "who are you", **members}, model_info("m"), {})


def reply(body: Body | None = None, **kwargs: Any) -> Any:
    return ADAPTER.reply(parse(), body or {}, context(model="m", **kwargs))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2)), ([0, VOCAB - 1], (0, VOCAB - 1))],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert parse(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (None, InvalidRequest),
        ("", InvalidRequest),
        ([], InvalidRequest),
        ([[]], InvalidRequest),
        ([""], InvalidRequest),
        (5, InvalidRequest),
        ({}, InvalidRequest),
        (True, InvalidRequest),
        ([1, "a"], InvalidRequest),
        ([1, None], InvalidRequest),
        ([1.0], InvalidRequest),
        ([True], InvalidRequest),
        ([None], InvalidRequest),
        ([VOCAB], GenerationRefused),
        ([-1], GenerationRefused),
        ([2**63], GenerationRefused),
    ],
)
def test_bad_prompts(prompt: Any, error: type[ServerError]) -> None:
    """A02, A16."""
    with pytest.raises(error, match="`prompt`"):
        parse(prompt=prompt)


def test_defaults_and_chat_only_fields() -> None:
    request = parse(
        messages=1, tools=1, tool_choice=1, chat_template=1, top_logprobs="x", echo=False, suffix=""
    )
    assert request.sampling.max_tokens == 512 and request.sampling.greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("model", "llama"),
        ("logprobs", True),
        ("logprobs", False),
        ("logprobs", -1),
        ("logprobs", 6),
        ("logprobs", "1"),
        ("echo", 1),
        ("suffix", 1),
        ("max_tokens", 0),
        ("temperature", -1),
        ("n", 0),
    ],
)
def test_wrong_values(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"`{field}`.*must be"):
        parse(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 0),
        ("logprobs", 5),
        ("echo", True),
        ("suffix", "end"),
        ("prompt", ["a", "b"]),
        ("prompt", [[1], [2]]),
        ("n", 2),
        ("use_beam_search", True),
        ("prompt_logprobs", 1),
    ],
)
def test_what_this_build_cannot_do_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"`{field}`.*not supported by this build"):
        parse(**{field: value})


def test_the_stream_of_the_reference() -> None:
    frames = stream(reply(number=1), steps([" I", " hope"], queue_waits_us=[5496, 146]))
    fixed = [re.sub(r'"created":\d+', '"created":1744948803', frame) for frame in frames]
    assert fixed[0] == (
        'data: {"id":"endpoint_common_1","object":"text_completion","created":1744948803,"model":"m",'
        '"choices":[{"index":0,"text":" I","logprobs":null,"stop_reason":null,"finish_reason":null}]}\n\n'
    )
    finish = payload(fixed[1])
    assert finish["choices"] == [
        {"index": 0, "text": " hope", "logprobs": None, "stop_reason": None, "finish_reason": "length"}
    ]
    assert finish["usage"] == {
        "prompt_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 2,
        "total_tokens": 26,
        "batch_size": [1, 1],
        "queue_wait_time": [5496, 146],
    }
    assert fixed[2:] == ["data: [DONE]\n\n"]


def test_full_text_frames_have_no_extra_member() -> None:
    chunks = [payload(frame) for frame in stream(reply(full_text=True), steps(["a", "b"]))[:-1]]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "ab"]
    assert "full_text" not in chunks[-1]


@pytest.mark.parametrize("stop_reason", ["END", 7, None])
def test_the_stop_reason_is_what_matched(stop_reason: str | int | None) -> None:
    answer = steps([" a", ""], finish=FinishReason.STOP, stop_reason=stop_reason)
    in_stream = payload(stream(reply(), answer)[-2])["choices"][0]
    alone = json.loads(reply().result(completion(answer)))["choices"][0]
    assert in_stream["stop_reason"] == alone["stop_reason"] == stop_reason
    assert in_stream["finish_reason"] == alone["finish_reason"] == "stop"


def test_the_whole_answer() -> None:
    body = json.loads(reply(number=8).result(completion(steps([" Ho", "pe"]))))
    assert body.pop("created") >= model_info().created
    assert list(body) == ["id", "object", "model", "choices", "usage"]
    assert (body["id"], body["object"], body["model"]) == ("endpoint_common_8", "text_completion", "m")
    assert body["choices"] == [
        {"index": 0, "text": " Hope", "logprobs": None, "stop_reason": None, "finish_reason": "length"}
    ]
    assert body["usage"]["completion_tokens"] == len(body["usage"]["batch_size"]) == 2


def test_include_usage_and_errors_are_as_in_chat() -> None:
    frames = stream(reply({"stream_options": {"include_usage": True}}), steps(["a"]))
    assert "usage" not in payload(frames[0]) and payload(frames[1])["usage"]["total_tokens"] == 25
    assert reply().error_frames(EngineFailed("x"))[-1] == b"data: [DONE]\n\n"
