"""POST /infer and /infer_token against the examples of the manual."""

from __future__ import annotations

import json
from typing import Any

import pytest

from endpoint.protocols.base import Body, FinishReason, GenerationRequest
from endpoint.protocols.mindie_native import MindIENative
from engine.errors import GenerationRefused, InvalidRequest, RequestTimeout, ServerError
from tests.endpoint.samples import VOCAB, completion, context, model_info, payload, steps, stream

ADAPTER = MindIENative()
MANUAL: dict[str, Any] = {
    "inputs": "My name is Olivier and I",
    "stream": True,
    "parameters": {
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.95,
        "max_new_tokens": 20,
        "do_sample": True,
        "seed": None,
        "repetition_penalty": 1.03,
        "details": True,
        "typical_p": 0.5,
        "watermark": False,
        "priority": 5,
        "timeout": 10,
    },
}


def parse(body: Body) -> GenerationRequest:
    return ADAPTER.parse(body, model_info(), {})


def with_parameters(**parameters: Any) -> GenerationRequest:
    return parse({"inputs": "hi", "parameters": parameters})


def reply(body: Body, **kwargs: Any) -> Any:
    return ADAPTER.reply(parse(body), body, context(**kwargs))


def test_the_request_of_the_manual() -> None:
    request = parse(MANUAL)
    assert request.prompt == "My name is Olivier and I" and request.stream
    assert (request.priority, request.timeout_s) == (5, 10)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 10, 0.95)
    assert (sampling.max_tokens, sampling.repetition_penalty) == (20, 1.03)
    assert 0 <= sampling.seed < 2**63


def test_defaults() -> None:
    request = parse({"inputs": "hi"})
    assert request.sampling.greedy and request.sampling.max_tokens == 20
    assert (request.stream, request.priority, request.timeout_s) == (False, 5, None)
    nulls = dict.fromkeys([*MANUAL["parameters"], "adapter_id"])
    assert parse(
        {"inputs": "hi", "input_id": None, "stream": None, "parameters": {**nulls, "seed": 1}}
    ) == parse({"inputs": "hi", "parameters": {"seed": 1}})


@pytest.mark.parametrize(
    ("members", "prompt"),
    [
        ({"inputs": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"input_id": [1, 2, VOCAB - 1]}, (1, 2, VOCAB - 1)),
    ],
)
def test_both_input_forms(members: Body, prompt: Any) -> None:
    assert parse(members).prompt == prompt


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({}, InvalidRequest),
        ({"inputs": None}, InvalidRequest),
        ({"inputs": ""}, InvalidRequest),
        ({"inputs": 1}, InvalidRequest),
        ({"inputs": []}, InvalidRequest),
        ({"inputs": [{"type": "text", "text": ""}]}, InvalidRequest),
        ({"inputs": [{"type": "image_url", "image_url": "x"}]}, InvalidRequest),
        ({"inputs": "a", "input_id": [1]}, InvalidRequest),
        ({"input_id": []}, InvalidRequest),
        ({"input_id": "1"}, InvalidRequest),
        ({"input_id": [1.0]}, InvalidRequest),
        ({"input_id": [True]}, InvalidRequest),
        ({"input_id": [-1]}, InvalidRequest),
        ({"input_id": [1_048_577]}, InvalidRequest),
        ({"input_id": [VOCAB]}, GenerationRefused),
        ({"inputs": "a", "stream": 1}, InvalidRequest),
        ({"inputs": "a", "parameters": []}, InvalidRequest),
        ({"inputs": "a", "parameters": "x"}, InvalidRequest),
    ],
)
def test_bad_bodies(members: Body, error: type[ServerError]) -> None:
    """A02, A16."""
    with pytest.raises(error):
        parse(members)


BAD: list[tuple[str, list[Any]]] = [
    ("temperature", [0, -1, "1", True]),
    ("top_k", [0, -1, 2**31, 1.0, True]),
    ("top_p", [0, 1, 1.0, -1, "x", True]),
    ("max_new_tokens", [0, -1, 2**31, 1.0, "20", True]),
    ("do_sample", [1, "true"]),
    ("seed", [-1, 2**64, 1.0, "1", True]),
    ("repetition_penalty", [0, -1, "1", True]),
    ("details", [1, "true"]),
    ("typical_p", [0, 1.1, "1", True]),
    ("watermark", [1, "true"]),
    ("priority", [0, 6, 1.0, "1", True]),
    ("timeout", [0, -1, 65536, 1.5, "1", True]),
    ("adapter_id", ["", 1, "a b", "x" * 257, "unknown", "../llama"]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD for value in values])
def test_a_wrong_parameter_is_refused_by_its_full_name(field: str, value: Any) -> None:
    """A01."""
    with pytest.raises(InvalidRequest, match=f"`parameters.{field}`"):
        with_parameters(**{field: value})


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_p": 0.001, "repetition_penalty": 50, "temperature": 3, "seed": 2**64 - 1, "timeout": 65535},
        {"adapter_id": "None"},
        {"adapter_id": "llama"},
        {"stop": 5, "ignore_eos": "x", "n": 0, "unknown": None},
    ],
)
def test_legal_and_ignored_parameters(parameters: dict[str, Any]) -> None:
    with_parameters(**parameters)


def test_do_sample_false_is_greedy_whatever_else_is_sent() -> None:
    assert with_parameters(do_sample=False, temperature=0.5, top_k=3, top_p=0.5).sampling.greedy


def test_the_stream_of_the_manual() -> None:
    body = {**MANUAL, "parameters": {**MANUAL["parameters"], "seed": 846930886}}
    answer = steps(
        ["am", " a", " French", "15"], ids=[626, 263, 5176, 29945], latencies_ms=[45.541, 128.32, 18.17, 16.8]
    )
    assert stream(reply(body), answer) == [
        'data: {"prefill_time":45.54,"decode_time":null,"token":{"id":[626],"text":"am"}}\n\n',
        'data: {"prefill_time":null,"decode_time":128.32,"token":{"id":[263],"text":" a"}}\n\n',
        'data: {"prefill_time":null,"decode_time":18.17,"token":{"id":[5176],"text":" French"}}\n\n',
        'data: {"prefill_time":null,"decode_time":16.80,"generated_text":"am a French15","details":'
        '{"finish_reason":"length","generated_tokens":4,"seed":846930886},"token":{"id":[29945],"text":null}}\n\n',
    ]


def test_details_are_null_in_a_stream_and_absent_in_an_answer_unless_asked_for() -> None:
    answer = steps(["a", "b"])
    assert payload(stream(reply({"inputs": "hi"}), answer)[-1])["details"] is None
    assert json.loads(reply({"inputs": "hi"}).result([completion(answer)])) == {"generated_text": "ab"}


def test_the_answer_of_the_manual() -> None:
    body = {"inputs": "hi", "parameters": {"details": True, "seed": 846930886}}
    assert json.loads(reply(body).result([completion(steps(["am a", " French"]))])) == {
        "generated_text": "am a French",
        "details": {"finish_reason": "length", "generated_tokens": 2, "seed": 846930886},
    }


def test_the_reported_seed_is_the_one_used() -> None:
    body = {"inputs": "hi", "parameters": {"details": True, "temperature": 1.0}}
    request = parse(body)
    answer = ADAPTER.reply(request, body, context()).result([completion(steps(["a"]))])
    assert json.loads(answer)["details"]["seed"] == request.sampling.seed


def test_one_token_is_one_frame_with_the_prefill_time() -> None:
    (frame,) = stream(reply({"inputs": "hi"}), steps(["a"]))
    only = payload(frame)
    assert only["prefill_time"] == 1.0 and only["decode_time"] is None
    assert only["generated_text"] == "a" and only["token"] == {"id": [100], "text": None}


def test_full_text_frames() -> None:
    frames = [
        payload(frame) for frame in stream(reply({"inputs": "hi"}, full_text=True), steps(["a", "b", "c"]))
    ]
    assert [frame["token"]["text"] for frame in frames] == ["a", "ab", None]
    assert frames[-1]["generated_text"] == "abc"


@pytest.mark.parametrize(
    ("finish", "worded"),
    [
        (FinishReason.EOS, "eos_token"),
        (FinishReason.STOP, "stop_sequence"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.CANCELLED, "stop_sequence"),
    ],
)
def test_finish_reasons(finish: FinishReason, worded: str) -> None:
    body = {"inputs": "hi", "parameters": {"details": True}}
    answer = steps(["a", ""], finish=finish)
    assert payload(stream(reply(body), answer)[-1])["details"]["finish_reason"] == worded
    assert json.loads(reply(body).result([completion(answer)]))["details"]["finish_reason"] == worded


def test_an_error_ends_the_stream_without_a_terminator() -> None:
    (frame,) = reply({"inputs": "hi"}).error_frames(RequestTimeout("Engine callback timeout: x"))
    assert payload(frame.decode())["error"] == "Engine callback timeout: x"
