"""POST /v1/completions: what differs from chat."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from endpoint.protocols.base import Body, FinishReason, GenerationRequest
from endpoint.protocols.openai_completions import OpenAICompletions
from engine.errors import EngineFailed, GenerationRefused, InvalidRequest, ServerError
from tests.endpoint.samples import (
    VOCAB,
    completion,
    context,
    interleaved,
    model_info,
    payload,
    steps,
    stream,
)

ADAPTER = OpenAICompletions()


def parse(**members: Any) -> GenerationRequest:
    return ADAPTER.parse({"model": "m", "prompt": "who are you", **members}, model_info("m"), {})


def reply(body: Body | None = None, **kwargs: Any) -> Any:
    members = body or {}
    return ADAPTER.reply(parse(**members), members, context(model="m", **kwargs))


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
    with pytest.raises(error, match="`prompt"):
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
        ("suffix", "end"),
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
    alone = json.loads(reply().result([completion(answer)]))["choices"][0]
    assert in_stream["stop_reason"] == alone["stop_reason"] == stop_reason
    assert in_stream["finish_reason"] == alone["finish_reason"] == "stop"


def test_the_whole_answer() -> None:
    body = json.loads(reply(number=8).result([completion(steps([" Ho", "pe"]))]))
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


# -- what the engine may not serve yet ---------------------------------------------------------------

BEAMS = [
    steps(
        ["\n", "I", " am", " a", " large"],
        queue_waits_us=[5496, 146, 65, 60, 111],
        logprobs=[
            ("\n", -1.8828125, [("\n", -1.8828125), ("\n\n", -2.0)]),
            ("I", -0.018310546875, [("I", -0.018310546875), ("Hello", -4.53125)]),
            (" am", -0.054931640625, [(" am", -0.054931640625), ("'m", -2.9375)]),
            (" a", -0.435546875, [(" a", -0.435546875), (" Q", -1.1875)]),
            (" large", -0.0286865234375, [(" large", -0.0286865234375), (" language", -4.78125)]),
        ],
    ),
    steps(
        ["\n\n", "I", " am", " a", " large"],
        queue_waits_us=[42, 27, 70, 64, 51],
        logprobs=[
            ("\n\n", -2.0, [("\n", -1.8828125), ("\n\n", -2.0)]),
            ("I", -0.031494140625, [("I", -0.031494140625), ("Hello", -4.28125)]),
            (" am", -0.0791015625, [(" am", -0.0791015625), ("'m", -2.578125)]),
            (" a", -0.5546875, [(" a", -0.5546875), (" Q", -1.0546875)]),
            (" large", -0.01092529296875, [(" large", -0.01092529296875), (" language", -6.375)]),
        ],
    ),
]
MANUAL_BEAM_FRAME = (
    'data: {"id":"endpoint_common_1","object":"text_completion","created":1744948803,"model":"m",'
    '"choices":[{"index":0,"text":"\\nI am a large","logprobs":{"text_offset":[0,1,2,5,7],"token_logprobs":'
    "[-1.8828125,-0.018310546875,-0.054931640625,-0.435546875,-0.0286865234375],"
    '"tokens":["\\n","I"," am"," a"," large"],"top_logprobs":[{"\\n":-1.8828125,"\\n\\n":-2.0},'
    '{"I":-0.018310546875,"Hello":-4.53125},{" am":-0.054931640625,"\'m":-2.9375},'
    '{" a":-0.435546875," Q":-1.1875},{" large":-0.0286865234375," language":-4.78125}]},'
    '"stop_reason":null,"finish_reason":"length"},{"index":1,"text":"\\n\\nI am a large","logprobs":'
    '{"text_offset":[13,15,16,19,21],"token_logprobs":[-2.0,-0.031494140625,-0.0791015625,-0.5546875,'
    '-0.01092529296875],"tokens":["\\n\\n","I"," am"," a"," large"],"top_logprobs":'
    '[{"\\n\\n":-2.0,"\\n":-1.8828125},{"I":-0.031494140625,"Hello":-4.28125},'
    '{" am":-0.0791015625,"\'m":-2.578125},{" a":-0.5546875," Q":-1.0546875},'
    '{" large":-0.01092529296875," language":-6.375}]},"stop_reason":null,"finish_reason":"length"}],'
    '"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens":10,'
    '"total_tokens":13,"batch_size":[1,1,1,1,1,1,1,1,1,1],'
    '"queue_wait_time":[5496,146,65,60,111,42,27,70,64,51]}}\n\n'
)


def test_the_beam_search_of_the_manual() -> None:
    body = {
        "temperature": 1,
        "max_tokens": 5,
        "use_beam_search": True,
        "ignore_eos": True,
        "n": 2,
        "best_of": 2,
        "stream": True,
        "logprobs": 2,
    }
    sampling = parse(**body).sampling
    assert (sampling.branches, sampling.beam_search, sampling.logprobs) == (2, True, 2)
    answer = reply(body, number=1, prompt_tokens=3)
    (frame,) = answer.beam_frames([completion(beam) for beam in BEAMS])
    assert re.sub(r'"created":\d+', '"created":1744948803', frame.decode()) == MANUAL_BEAM_FRAME
    assert answer.tail() == (b"data: [DONE]\n\n",)


def test_a_beam_search_with_include_usage_has_its_usage_in_the_totals_frame() -> None:
    answer = reply({"n": 2, "use_beam_search": True, "stream_options": {"include_usage": True}})
    (frame,) = answer.beam_frames([completion(beam) for beam in BEAMS])
    assert "usage" not in payload(frame.decode())
    totals, done = answer.tail()
    assert payload(totals.decode())["usage"]["completion_tokens"] == 10 and done == b"data: [DONE]\n\n"


def test_streamed_logprobs_join_to_those_of_the_whole_answer() -> None:
    body = {"n": 2, "logprobs": 2}
    whole = json.loads(reply(body).result([completion(beam) for beam in BEAMS]))["choices"]
    lists: list[dict[str, list[Any]]] = [{}, {}]
    for frame in stream(reply(body), interleaved(BEAMS))[:-1]:
        choice = payload(frame)["choices"][0]
        for name, values in choice["logprobs"].items():
            lists[choice["index"]].setdefault(name, []).extend(values)
    begin = whole[1]["logprobs"]["text_offset"][0]
    assert begin == len(whole[0]["text"])
    lists[1]["text_offset"] = [begin + offset for offset in lists[1]["text_offset"]]  # counted from 0 there
    assert lists == [choice["logprobs"] for choice in whole]


@pytest.mark.parametrize("asked", range(6))
def test_each_position_has_the_chosen_token_first_and_at_most_one_more_than_asked_for(asked: int) -> None:
    assert parse(logprobs=asked).sampling.logprobs == asked
    likely = [(f"t{i}", -float(i + 1)) for i in range(asked)]
    answer = steps(["t0", "x"], logprobs=[("t0", -1.0, likely), ("x", -9.0, likely)])
    choice = json.loads(reply({"logprobs": asked}).result([completion(answer)]))["choices"][0]
    first, second = choice["logprobs"]["top_logprobs"]
    assert (next(iter(first)), next(iter(second))) == ("t0", "x")
    assert len(first) == max(1, asked) and len(second) == asked + 1


@pytest.mark.parametrize("full_text", [False, True])
def test_echo(full_text: bool) -> None:
    answer = steps(["a", "b", "c"])
    frames = stream(reply({"echo": True}, full_text=full_text, echoes=["who? "]), answer)[:-1]
    texts = [payload(frame)["choices"][0]["text"] for frame in frames]
    assert texts == (["who? a", "who? ab", "who? abc"] if full_text else ["who? a", "b", "c"])
    body = json.loads(reply({"echo": True}, echoes=["who? "]).result([completion(answer)]))
    assert body["choices"][0]["text"] == "who? abc"


def test_only_chosen_candidates_are_answered_and_all_are_counted() -> None:
    body = {"n": 1, "best_of": 3}
    request = parse(**body)
    assert (request.n, request.sampling.branches, request.sampling.logprobs) == (1, 3, 0)
    ranked = [completion(steps(["a"], logprobs=[("a", -0.1, [])])) for _ in range(3)]
    answer = json.loads(reply(body).result(ranked))
    assert len(answer["choices"]) == 1 and answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 3
