"""POST /v1/chat/completions: bodies in, frames and answers out, against the examples of the manual."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from endpoint.protocols.base import Body, ChatPrompt, FinishReason, GenerationRequest
from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.protocols.registry import load_adapters
from endpoint.protocols.triton import MODEL_PATH
from engine.errors import EngineFailed, InvalidRequest
from tests.endpoint.samples import completion, context, interleaved, model_info, payload, steps, stream

ADAPTER = OpenAIChat()
MESSAGES = [{"role": "user", "content": "You are a helpful assistant."}]
MANUAL_TEXTS = ["You", " are", " a", " helpful", " assistant"]
MANUAL_WAITS = [5318, 117, 82, 72, 196]


def parse(**members: Any) -> GenerationRequest:
    return ADAPTER.parse({"model": "llama", "messages": MESSAGES, **members}, model_info(), {})


def reply(body: Body | None = None, **kwargs: Any) -> Any:
    members = body or {}
    return ADAPTER.reply(parse(**members), members, context(**kwargs))


def with_fixed_time(frame: str) -> str:
    return re.sub(r'"created":\d+', '"created":1744038509', frame)


# -- requests ----------------------------------------------------------------------------------------


def test_the_request_of_the_manual_with_one_choice() -> None:
    request = parse(
        stream=True,
        presence_penalty=1.03,
        frequency_penalty=1.0,
        repetition_penalty=1.0,
        temperature=0.5,
        top_p=0.95,
        top_k=1,
        seed=1,
        max_tokens=5,
        n=1,
        best_of=1,
    )
    assert request.prompt == ChatPrompt(MESSAGES)
    assert request.stream and request.skip_special_tokens and not request.include_stop
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (5, 0.5, 1, 0.95)
    assert (sampling.seed, sampling.presence_penalty, sampling.frequency_penalty) == (1, 1.03, 1.0)


def test_a_bare_request_is_greedy_over_max_iter_times() -> None:
    request = parse()
    assert request.sampling.greedy and request.sampling.max_tokens == 512 and not request.stream


def test_null_is_not_sent_and_unknown_fields_are_ignored() -> None:
    sampled = [
        "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "min_p", "seed", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "n", "best_of",
        "use_beam_search", "logprobs", "top_logprobs", "stop", "stop_token_ids", "include_stop_str_in_output",
        "skip_special_tokens", "ignore_eos", "min_tokens", "response_format", "tools", "tool_choice",
        "parallel_tool_calls", "chat_template_kwargs", "chat_template", "add_generation_prompt",
        "continue_final_message", "prompt_logprobs",
    ]  # fmt: skip
    ignored = {
        "echo": 7,
        "user": [],
        "metadata": 1,
        "priority": "x",
        "timeout": -1,
        "request_id": {},
        "zzz": None,
    }
    bare, nulls = parse(seed=3), parse(**{**dict.fromkeys(sampled), **ignored, "seed": 3})
    assert nulls == bare


def test_max_completion_tokens_wins() -> None:
    assert parse(max_tokens=7, max_completion_tokens=9).sampling.max_tokens == 9
    assert parse(max_tokens=7).sampling.max_tokens == 7
    assert parse(max_tokens=2**31 - 1).sampling.max_tokens == 512


def test_stops() -> None:
    request = parse(stop=["a", "b"], stop_token_ids=[4, 4], include_stop_str_in_output=True, ignore_eos=True)
    assert request.stop == ("a", "b") and request.include_stop
    assert request.sampling.stop_token_ids == (4,) and request.sampling.ignore_eos
    assert not parse(include_stop_str_in_output=True).include_stop


def test_what_goes_to_the_template() -> None:
    prompt = parse(
        chat_template_kwargs={"enable_thinking": False, "x": 1}, add_generation_prompt=False
    ).prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_kwargs == {"enable_thinking": False, "x": 1} and not prompt.add_generation_prompt


FUNCTION = {"type": "function", "function": {"name": "get_天气", "parameters": {}}}
HARMLESS: list[dict[str, Any]] = [
    {"n": 1, "best_of": 1, "use_beam_search": False, "logprobs": False, "min_p": 0, "min_tokens": 0},
    {"tools": [FUNCTION], "tool_choice": "none"},
    {"logit_bias": {}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False},
    {"top_k": 0, "top_p": 1, "temperature": 0, "stop": [], "continue_final_message": False},
    {"stream_options": {"include_usage": True, "other": 1}, "stream": False},
    {"temperature": 100, "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 2},
]


@pytest.mark.parametrize("members", HARMLESS)
def test_legal_values_at_the_edges(members: dict[str, Any]) -> None:
    parse(**members)


BAD: list[tuple[str, list[Any]]] = [
    ("model", [None, "", 1, "other", ["llama"], "../llama"]),
    ("messages", [None, [], "hi", {}, [1]]),
    ("stream", [1, "true", 0]),
    ("stream_options", [1, "x", [], {"include_usage": 1}]),
    ("max_tokens", [0, -1, 2**31, 1.0, "5", True, 10**400]),
    ("max_completion_tokens", [0, 2**31, "5"]),
    ("temperature", [-0.1, "1", True, float("inf"), 10**400]),
    ("top_p", [0, -1, 1.1, "1", True]),
    ("top_k", [-2, 2**31, 1.0, "1", True]),
    ("min_p", [-0.1, 1.1, "0"]),
    ("seed", [-1, 2**64, 1.0, "1", True]),
    ("presence_penalty", [-2.1, 2.1, "0", True]),
    ("frequency_penalty", [-2.1, 2.1, "0", False]),
    ("repetition_penalty", [0, -1, 2.1, "1", True]),
    ("logit_bias", [[], 1, {"x": 1}, {"1": 101}, {"1": "1"}, {"1": None}, {"-1": 1}]),
    ("n", [0, -1, 129, 1.0, "1", True, 10**30]),
    ("best_of", [0, 129, 1.0, "1", True]),
    ("use_beam_search", [1, "true"]),
    ("logprobs", [1, "true"]),
    ("top_logprobs", [-1, 21, True, 1.0]),
    ("stop", ["", [""], 1, [1]]),
    ("stop_token_ids", [1, ["1"], [1.5], [True]]),
    ("include_stop_str_in_output", [1, "true"]),
    ("skip_special_tokens", [1, "true"]),
    ("ignore_eos", [1, "true"]),
    ("min_tokens", [-1, 1.0, "1", True]),
    ("response_format", ["json", [], {}, {"type": 1}, {"type": "xml"}, {"type": "json_schema"}]),
    ("tools", [{}, "x", [1], [{}], [{"type": "code"}], [{"type": "function"}]]),
    ("tool_choice", ["maybe", 1, [], {}, {"type": "function", "function": {}}]),
    ("parallel_tool_calls", [1, "true"]),
    ("chat_template_kwargs", [1, "x", [], {"enable_thinking": 1}, {"thinking_budget": 0}]),
    ("chat_template", ["", 1]),
    ("add_generation_prompt", [1, "true"]),
    ("continue_final_message", [1, "true"]),
    ("prompt_logprobs", [-1, 21, True, 1.0]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD for value in values])
def test_a_wrong_type_or_range_is_refused_by_name(field: str, value: Any) -> None:
    """A01, A02."""
    with pytest.raises(InvalidRequest) as caught:
        parse(**{field: value})
    assert f"`{field}" in str(caught.value) and "not supported" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
        ({"n": 2, "temperature": 0}, "temperature"),
        ({"best_of": 2, "temperature": 0}, "temperature"),
        ({"use_beam_search": True, "max_tokens": 129}, "max_tokens"),
        ({"use_beam_search": True, "max_completion_tokens": 129, "max_tokens": 5}, "max_completion_tokens"),
        ({"use_beam_search": True, "response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_forbidden_combinations(members: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"`{field}`.*must be"):
        parse(**members)


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "n"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_asynchronous_scheduling_serves_one_answer_per_prompt(members: dict[str, Any], field: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "llama", **members}
    ADAPTER.parse(body, model_info(), {})
    with pytest.raises(InvalidRequest, match=f"`{field}`.*MINDIE_ASYNC_SCHEDULING_ENABLE=1"):
        ADAPTER.parse(body, replace(model_info(), one_answer=True), {})
    ADAPTER.parse({**body, **dict.fromkeys(members)}, replace(model_info(), one_answer=True), {})


# -- answers -----------------------------------------------------------------------------------------


def test_the_stream_of_the_manual() -> None:
    frames = stream(reply(), steps(MANUAL_TEXTS, queue_waits_us=MANUAL_WAITS))
    head = (
        'data: {"id":"endpoint_common_10","object":"chat.completion.chunk","created":1744038509,'
        '"model":"llama",'
    )
    middle = [
        f'{head}"choices":[{{"index":0,"delta":{{"role":"assistant","content":"{text}"}},"logprobs":null,'
        '"finish_reason":null}]}\n\n'
        for text in MANUAL_TEXTS[:-1]
    ]
    # the manual has a space after two colons of the usage object
    finish = (
        f'{head}"usage":{{"prompt_tokens":24,"prompt_tokens_details":{{"cached_tokens":0}},"completion_tokens":5,'
        '"total_tokens":29,"batch_size":[1,1,1,1,1],"queue_wait_time":[5318,117,82,72,196]},'
        '"choices":[{"index":0,"delta":{"role":"assistant","content":" assistant"},"logprobs":null,'
        '"finish_reason":"length"}]}\n\n'
    )
    assert [with_fixed_time(frame) for frame in frames] == [*middle, finish, "data: [DONE]\n\n"]


def test_include_usage_moves_the_usage_into_a_frame_of_its_own() -> None:
    body = {"stream_options": {"include_usage": True}}
    frames = stream(reply(body), steps(MANUAL_TEXTS, queue_waits_us=MANUAL_WAITS))
    *chunks, totals = [payload(frame) for frame in frames[:-1]]
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert (
        totals["choices"] == []
        and totals["id"] == chunks[0]["id"]
        and totals["object"] == chunks[0]["object"]
    )
    assert totals["usage"] == {
        "prompt_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 5,
        "total_tokens": 29,
        "batch_size": [1] * 5,
        "queue_wait_time": MANUAL_WAITS,
    }
    assert frames[-1] == "data: [DONE]\n\n"


def test_frames_are_one_line_whatever_the_text() -> None:
    text = 'a"\\\n\r\u2028\u2029\x85\x0b\x1c\0é😀'
    for frame in stream(reply(), steps([text, text]))[:-1]:
        assert len(frame.splitlines()) == 2
        assert payload(frame)["choices"][0]["delta"] == {"role": "assistant", "content": text}


def test_full_text_frames() -> None:
    chunks = [payload(frame) for frame in stream(reply(full_text=True), steps(["a", "b", "c"]))[:-1]]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["a", "ab", "abc"]
    assert [chunk.get("full_text") for chunk in chunks] == [None, None, "abc"]


@pytest.mark.parametrize(
    ("finish", "worded"),
    [
        (FinishReason.EOS, "stop"),
        (FinishReason.STOP, "stop"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.CANCELLED, "stop"),
    ],
)
def test_finish_reasons(finish: FinishReason, worded: str) -> None:
    answer = steps(["a", ""], finish=finish)
    assert payload(stream(reply(), answer)[-2])["choices"][0]["finish_reason"] == worded
    assert json.loads(reply().result([completion(answer)]))["choices"][0]["finish_reason"] == worded


def test_the_whole_answer() -> None:
    answer = steps(MANUAL_TEXTS, latencies_ms=[45.5449, 16.8, 1.0, 2.0, 3.006], queue_waits_us=MANUAL_WAITS)
    body = json.loads(reply(number=8).result([completion(answer)]))
    assert body.pop("created") >= model_info().created
    assert body == {
        "id": "endpoint_common_8",
        "object": "chat.completion",
        "model": "llama",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "You are a helpful assistant", "tool_calls": []},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 24,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": 5,
            "total_tokens": 29,
            "batch_size": [1, 1, 1, 1, 1],
            "queue_wait_time": MANUAL_WAITS,
        },
        "prefill_time": 45.54,
        "decode_time_arr": [16.8, 1.0, 2.0, 3.01],
    }


def test_an_error_ends_the_stream() -> None:
    error, done = reply().error_frames(EngineFailed("the engine died"))
    assert payload(error.decode()) == {
        "error": "the engine died",
        "error_type": "Incomplete Generation",
        "type": "Incomplete Generation",
    }
    assert done == b"data: [DONE]\n\n"


def test_adapters_are_registered() -> None:
    routes = {adapter.name: adapter.routes for adapter in load_adapters()}
    assert routes == {
        "openai_chat": ("/v1/chat/completions",),
        "openai_completions": ("/v1/completions",),
        "vllm_generate": ("/generate",),
        "tgi_generate": ("/generate",),
        "tgi_generate_stream": ("/generate_stream",),
        "tgi_root": ("/",),
        "triton_generate": (f"{MODEL_PATH}/generate",),
        "triton_generate_stream": (f"{MODEL_PATH}/generate_stream",),
        "triton_infer": (f"{MODEL_PATH}/infer",),
        "mindie_native": ("/infer", "/infer_token"),
    }


# -- what the engine may not serve yet ---------------------------------------------------------------

MANUAL = {
    "stream": True,
    "presence_penalty": 1.03,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.0,
    "temperature": 0.5,
    "top_p": 0.95,
    "top_k": 1,
    "seed": 1,
    "max_tokens": 5,
    "n": 2,
    "best_of": 2,
}


def test_the_stream_of_the_manual_with_two_choices() -> None:
    request = parse(**MANUAL)
    assert (request.n, request.sampling.branches, request.sampling.logprobs) == (2, 2, -1)
    one = steps(MANUAL_TEXTS, queue_waits_us=MANUAL_WAITS)
    frames = [with_fixed_time(frame) for frame in stream(reply(MANUAL), interleaved([one, one]))]
    alone = [with_fixed_time(frame) for frame in stream(reply(), one)]
    expected = [frame.replace('"index":0', f'"index":{index}') for frame in alone[:-1] for index in range(2)]
    assert frames == [*expected, "data: [DONE]\n\n"]


def test_totals_are_over_all_choices() -> None:
    body = {**MANUAL, "stream_options": {"include_usage": True}}
    frames = stream(reply(body), interleaved([steps(["a", "b", "c"]), steps(["d"])]))
    *chunks, totals = [payload(frame) for frame in frames[:-1]]
    assert all("usage" not in chunk for chunk in chunks)
    assert totals["usage"]["completion_tokens"] == len(totals["usage"]["batch_size"]) == 4
    assert totals["usage"]["total_tokens"] == 28


def test_a_whole_answer_with_two_choices() -> None:
    answers = [
        completion(steps(["a", "b"], latencies_ms=[3.0, 1.0])),
        completion(steps(["c"], latencies_ms=[9.0], finish=FinishReason.EOS)),
    ]
    body = json.loads(reply({"n": 2}).result(answers))
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "ab", "length"),
        (1, "c", "stop"),
    ]
    assert body["usage"]["completion_tokens"] == 3 and len(body["usage"]["queue_wait_time"]) == 3
    assert body["prefill_time"] == 3.0 and body["decode_time_arr"] == [1.0]


def test_a_streamed_beam_search_is_one_frame_per_choice() -> None:
    body = {"n": 2, "use_beam_search": True, "stream": True}
    sampling = parse(**body).sampling
    assert (sampling.branches, sampling.beam_search, sampling.max_tokens) == (2, True, 128)
    answer = reply(body)
    answers = [completion(steps(["a", "b"])), completion(steps(["c"], finish=FinishReason.EOS))]
    frames = [payload(frame.decode()) for frame in answer.beam_frames(answers)]
    assert [frame["choices"][0]["delta"]["content"] for frame in frames] == ["ab", "c"]
    assert [frame["choices"][0]["index"] for frame in frames] == [0, 1]
    assert [frame["choices"][0]["finish_reason"] for frame in frames] == ["length", "stop"]
    assert [frame["usage"]["completion_tokens"] for frame in frames] == [2, 1]
    assert answer.tail() == (b"data: [DONE]\n\n",)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"n": 3}, {"branches": 3, "temperature": 1.0}),
        ({"best_of": 3}, {"branches": 3, "temperature": 1.0, "logprobs": 0}),
        ({"best_of": 3, "logprobs": True, "top_logprobs": 2}, {"branches": 3, "logprobs": 2}),
        ({"logprobs": True}, {"logprobs": 0, "temperature": 0.0}),
        ({"top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False}, {"logprobs": -1}),
        ({"use_beam_search": True}, {"branches": 1, "beam_search": True, "max_tokens": 128}),
        (
            {"use_beam_search": True, "n": 2, "best_of": 1, "temperature": 0, "top_p": 0.5, "max_tokens": 9},
            {"branches": 2, "beam_search": True, "temperature": 0.0, "top_p": 1.0, "max_tokens": 9},
        ),
        ({"use_beam_search": True, "n": 2, "temperature": 1}, {"temperature": 0.0}),
        ({"min_p": 0.25, "min_tokens": 3}, {"min_p": 0.25, "min_tokens": 3}),
        ({"min_tokens": 10**30, "max_tokens": 7}, {"min_tokens": 7}),
        ({"logit_bias": {"5": -100, "0": 2.5}}, {"logit_bias": ((5, -100.0), (0, 2.5))}),
    ],
)
def test_what_the_engine_is_asked_for(members: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = parse(**members).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_a_bias_for_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="32000"):
        parse(logit_bias={"32000": 1})


CHOSEN = [
    ("You", -0.12, [("You", -0.12), ("I", -2.5)]),
    ("你", -1.0, [("He", -0.5), ("你", -1.0)]),
]


@pytest.mark.parametrize(("body", "count"), [({"logprobs": True}, 0), ({"top_logprobs": 2}, 2)])
def test_logprobs(body: Body, count: int) -> None:
    answer = steps(["You", "你"], logprobs=CHOSEN)
    content = json.loads(reply(body).result([completion(answer)]))["choices"][0]["logprobs"]["content"]
    first, second = content
    assert (first["token"], first["logprob"], first["bytes"]) == ("You", -0.12, [89, 111, 117])
    assert second["bytes"] == list("你".encode())
    assert [top["token"] for top in second["top_logprobs"]] == ["He", "你"][:count]
    assert all(set(top) == {"token", "logprob", "bytes"} for top in first["top_logprobs"])
    frames = [
        payload(frame)["choices"][0]["logprobs"]["content"] for frame in stream(reply(body), answer)[:-1]
    ]
    assert frames == [[first], [second]]


def test_logprobs_are_null_unless_asked_for_even_if_they_are_known() -> None:
    answer = steps(["You", "你"], logprobs=CHOSEN)
    assert json.loads(reply().result([completion(answer)]))["choices"][0]["logprobs"] is None
    assert [payload(f)["choices"][0]["logprobs"] for f in stream(reply(), answer)[:-1]] == [None, None]
