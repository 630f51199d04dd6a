"""Triton's routes against the examples of the reference."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from endpoint.protocols.base import FinishReason, GenerationRequest
from endpoint.protocols.triton import (
    MODEL_PATH,
    TritonGenerate,
    TritonGenerateStream,
    TritonInfer,
    stop_infer_id,
)
from engine.errors import GenerationRefused, InvalidRequest, NotFound, RequestTimeout, ServerError
from tests.endpoint.samples import VOCAB, completion, context, model_info, steps

TEXT = [TritonGenerate(), TritonGenerateStream()]
INFER = TritonInfer()
PATH = {"model": "llama"}
TENSOR: dict[str, Any] = {"name": "input0", "shape": [1, 3], "datatype": "UINT32", "data": [1, 2, 3]}
INFER_BODY: dict[str, Any] = {"id": "42", "inputs": [TENSOR], "outputs": [{"name": "output0"}]}
TEXT_BODY: dict[str, Any] = {"id": "a123", "text_input": "My name is Olivier and I"}
EVERY = [(TEXT[0], TEXT_BODY), (TEXT[1], TEXT_BODY), (INFER, INFER_BODY)]
EVERY_IDS = [adapter.name for adapter, _ in EVERY]
MANUAL_IDS, MANUAL_TIMES, MANUAL_WAITS = [5735, 297, 3681], [16.6, 8.2, 7.4], [5082, 36, 30]


def parse(adapter: Any, body: dict[str, Any], **more: Any) -> GenerationRequest:
    request: GenerationRequest = adapter.parse({**body, **more}, model_info(), PATH)
    return request


def text_reply(full_text: bool = False, **members: Any) -> Any:
    body = {**TEXT_BODY, **members}
    return TEXT[0].reply(parse(TEXT[0], body), body, context(full_text=full_text))


def frames(reply: Any, of: Any) -> list[Any]:
    raw = [reply.frame(step).decode() for step in of]
    assert reply.tail() == ()
    assert all(
        frame.startswith("data:{") and frame.endswith("}\n\n") and frame.count("\n") == 2 for frame in raw
    )
    return [json.loads(frame[5:]) for frame in raw]


# -- what the routes share ---------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "body"), EVERY, ids=EVERY_IDS)
def test_a_wrong_model_in_the_path_comes_before_the_body(adapter: Any, body: dict[str, Any]) -> None:
    for wrong in ({}, body, {"id": 5}):
        with pytest.raises(NotFound):
            adapter.parse(wrong, model_info(), {"model": "other"})


def test_model_names_in_paths() -> None:
    pattern = re.compile(MODEL_PATH.partition(":")[2].rstrip("}"))
    assert pattern.fullmatch("Qwen2.5-7B_x") and not pattern.fullmatch("a/b") and not pattern.fullmatch("a b")


@pytest.mark.parametrize(("adapter", "body"), EVERY, ids=EVERY_IDS)
def test_every_parameter_is_read(adapter: Any, body: dict[str, Any]) -> None:
    parameters = {
        "temperature": 0.5, "top_k": 3, "top_p": 1.0, "typical_p": 0.5, "do_sample": True, "seed": 7,
        "repetition_penalty": 3.5, "max_new_tokens": 7, "details": True, "perf_stat": True, "batch_size": 4,
        "watermark": False, "priority": 1, "timeout": 65535,
    }  # fmt: skip
    request = parse(adapter, body, parameters=parameters)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 1.0, 7)
    assert (sampling.repetition_penalty, sampling.max_tokens) == (3.5, 7)
    assert (request.priority, request.timeout_s, request.client_id) == (1, 65535, body["id"])
    assert request.stream is (adapter is TEXT[1])


@pytest.mark.parametrize(("adapter", "body"), EVERY, ids=EVERY_IDS)
def test_defaults_and_ignored_fields(adapter: Any, body: dict[str, Any]) -> None:
    bare = parse(adapter, body, parameters={"seed": 1})
    assert bare.sampling.greedy and bare.sampling.max_tokens == 20
    assert (bare.priority, bare.timeout_s) == (5, None)
    nulls = dict.fromkeys(["temperature", "top_k", "top_p", "do_sample", "details", "priority", "timeout"])
    ignored = {"stop": 5, "n": 0, "best_of": 2, "ignore_eos": 1, "frequency_penalty": 9, "logprobs": "x"}
    assert parse(adapter, body, parameters={"seed": 1, **nulls, **ignored}, stream=True) == bare
    assert parse(adapter, body, parameters={"seed": 1, "top_k": 0, "do_sample": False}) == bare
    assert parse(adapter, body, parameters=None).sampling.greedy


BAD: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [0, 2**31, 1.0, "1", True]),
    ("temperature", [0, -1, "1"]),
    ("top_k", [-1, 2**31, 1.0]),
    ("top_p", [0, 1.1]),
    ("typical_p", [0, 1.1]),
    ("do_sample", [1]),
    ("seed", [-1, 2**64]),
    ("repetition_penalty", [0]),
    ("batch_size", [0, 2**31, 1.0]),
    ("watermark", [1]),
    ("details", [1]),
    ("perf_stat", [1]),
    ("priority", [0, 6, 1.0]),
    ("timeout", [0, 65536, 1.5]),
]


@pytest.mark.parametrize(("adapter", "body"), EVERY, ids=EVERY_IDS)
@pytest.mark.parametrize(("field", "values"), BAD, ids=[field for field, _ in BAD])
def test_a_wrong_parameter_is_refused_by_its_full_name(
    adapter: Any, body: dict[str, Any], field: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=f"`parameters.{field}`"):
            parse(adapter, body, parameters={field: value})


@pytest.mark.parametrize(("adapter", "body"), EVERY, ids=EVERY_IDS)
def test_ids(adapter: Any, body: dict[str, Any]) -> None:
    assert parse(adapter, body, id="a_-" + "Z" * 253).client_id == "a_-" + "Z" * 253
    drawn = {parse(adapter, body, id=None).client_id for _ in range(20)}
    assert len(drawn) == 20 and all(stop_infer_id({"id": drawn_id}) == drawn_id for drawn_id in drawn)
    for wrong in ("", "a b", "x" * 257, 5, True, ["a"], "a\n", "é"):
        with pytest.raises(InvalidRequest, match="`id`"):
            parse(adapter, body, id=wrong)
        with pytest.raises(InvalidRequest, match="`id`"):
            stop_infer_id({"id": wrong})


def test_stop_infer_needs_an_id() -> None:
    for body in ({}, {"id": None}):
        with pytest.raises(InvalidRequest, match="`id`"):
            stop_infer_id(body)


# -- generate, generate_stream -----------------------------------------------------------------------


@pytest.mark.parametrize("adapter", TEXT, ids=EVERY_IDS[:2])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("text_input", [None, "", 5, [], {}, [{"type": "image"}], [{"type": "text", "text": ""}]]),
        ("parameters", [[], "x", 1, True]),
        ("details", [1, "true"]),
    ],
)
def test_bad_text_bodies(adapter: Any, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=f"`{field}"):
            parse(adapter, TEXT_BODY, **{field: value})


def test_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(TEXT[0], TEXT_BODY, text_input=parts).prompt == "ab"


def manual_steps() -> Any:
    return steps(["live", " in", " Paris"], MANUAL_IDS, MANUAL_TIMES, MANUAL_WAITS)


def test_the_answer_of_the_reference() -> None:
    asked = {"parameters": {"details": True, "perf_stat": True}}
    assert json.loads(text_reply(**asked).result([completion(manual_steps())])) == {
        "id": "a123",
        "model_name": "llama",
        "model_version": None,
        "text_output": "live in Paris",
        "details": {
            "finish_reason": "length",
            "generated_tokens": 3,
            "first_token_cost": None,
            "decode_cost": None,
            "perf_stat": [[5735, 17], [297, 8], [3681, 7]],
            "batch_size": [1, 1, 1],
            "queue_wait_time": MANUAL_WAITS,
        },
    }


@pytest.mark.parametrize(
    ("members", "details", "perf"),
    [
        ({}, False, False),
        ({"parameters": {"perf_stat": True}}, False, False),
        ({"details": True}, True, False),
        ({"parameters": {"details": True}}, True, False),
        ({"details": True, "parameters": {"perf_stat": True}}, True, True),
    ],
)
def test_when_there_are_details(members: dict[str, Any], details: bool, perf: bool) -> None:
    whole = json.loads(text_reply(**members).result([completion(manual_steps())]))
    for answer in (whole, *frames(text_reply(**members), manual_steps())):
        assert ("details" in answer) is details
        assert ("perf_stat" in answer.get("details", {})) is perf


def test_the_stream_of_the_reference() -> None:
    body = {**TEXT_BODY, "parameters": {"details": True, "perf_stat": True}}
    reply = TEXT[1].reply(parse(TEXT[1], body), body, context())
    first, second, last = [reply.frame(step).decode() for step in manual_steps()]
    head = 'data:{"id":"a123","model_name":"llama","model_version":null,'
    costs = '"first_token_cost":null,"decode_cost":null'
    assert first == (
        f'{head}"text_output":"live","details":{{"generated_tokens":1,{costs},"perf_stat":[[5735,17]],'
        '"batch_size":1,"queue_wait_time":5082},"prefill_time":17,"decode_time":null}\n\n'
    )
    assert second == (
        f'{head}"text_output":" in","details":{{"generated_tokens":2,{costs},"perf_stat":[[5735,17],[297,8]],'
        '"batch_size":1,"queue_wait_time":36},"prefill_time":null,"decode_time":8}\n\n'
    )
    assert last == (
        f'{head}"text_output":" Paris","details":{{"finish_reason":"length","generated_tokens":3,{costs},'
        '"perf_stat":[[5735,17],[297,8],[3681,7]],"batch_size":1,"queue_wait_time":30},'
        '"prefill_time":null,"decode_time":7}\n\n'
    )
    assert reply.tail() == ()


def test_full_text_frames() -> None:
    texts = [frame["text_output"] for frame in frames(text_reply(full_text=True), steps(["a", "b", "c"]))]
    assert texts == ["a", "ab", "abc"]


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
    answer = steps(["a", ""], finish=finish)
    assert (
        json.loads(text_reply(details=True).result([completion(answer)]))["details"]["finish_reason"]
        == worded
    )
    first, last = frames(text_reply(details=True), answer)
    assert "finish_reason" not in first["details"] and last["details"]["finish_reason"] == worded


def test_an_error_frame_has_no_space_either() -> None:
    (frame,) = text_reply().error_frames(RequestTimeout("Engine callback timeout: x"))
    assert frame.startswith(b'data:{"error":"Engine callback timeout: x"') and frame.endswith(b"}\n\n")


# -- infer -------------------------------------------------------------------------------------------


def with_tensor(**members: Any) -> dict[str, Any]:
    return {**INFER_BODY, "inputs": [{**TENSOR, **members}]}


@pytest.mark.parametrize("shape", [[3], [1, 3]])
def test_both_shapes(shape: list[int]) -> None:
    assert parse(INFER, with_tensor(shape=shape)).prompt == (1, 2, 3)


BAD_INFER: list[tuple[dict[str, Any], type[ServerError]]] = [
    *(
        ({**INFER_BODY, "inputs": v}, InvalidRequest)
        for v in (None, [], [TENSOR, TENSOR], {}, "x", [1], [None])
    ),
    *(
        ({**INFER_BODY, "outputs": v}, InvalidRequest)
        for v in (None, [], [{}, {}], {}, [1], [{}], [{"name": 1}])
    ),
    ({**INFER_BODY, "outputs": [{"name": "x" * 257}]}, InvalidRequest),
    *((with_tensor(name=v), InvalidRequest) for v in (None, 1, "x" * 257)),
    *((with_tensor(datatype=v), InvalidRequest) for v in (None, "INT64", 1, "uint32")),
    *(
        (with_tensor(shape=v), InvalidRequest)
        for v in (
            None,
            [],
            3,
            [2],
            [4],
            [0],
            [-3],
            [3, 1],
            [2, 3],
            [1, 1, 3],
            [1.0, 3],
            [True, 3],
            ["3"],
            [1, 3.0],
        )
    ),
    (with_tensor(shape=[True], data=[1]), InvalidRequest),
    (with_tensor(shape=[1_048_577]), InvalidRequest),
    *(
        (with_tensor(data=v), InvalidRequest)
        for v in (
            None,
            [],
            [1],
            [1, 2],
            [1, 2, 3, 4],
            [[1, 2, 3]],
            "123",
            [1, 2, "3"],
            [1, 2, 3.0],
            [1, 2, True],
        )
    ),
    (with_tensor(data=[1, 2, VOCAB]), GenerationRefused),
    (with_tensor(data=[-1, 2, 3]), GenerationRefused),
]


@pytest.mark.parametrize(("body", "error"), BAD_INFER)
def test_bad_tensors(body: dict[str, Any], error: type[ServerError]) -> None:
    with pytest.raises(error, match=r"`(inputs|outputs)"):
        parse(INFER, body)


def test_parameters_stand_at_the_top_or_else_in_the_tensor() -> None:
    inner = with_tensor(parameters={"max_new_tokens": 3})
    assert parse(INFER, inner).sampling.max_tokens == 3
    assert parse(INFER, inner, parameters={}).sampling.max_tokens == 3
    assert parse(INFER, inner, parameters={"max_new_tokens": 4}).sampling.max_tokens == 4
    with pytest.raises(InvalidRequest, match=r"`inputs\[0\].parameters.top_k`"):
        parse(INFER, with_tensor(parameters={"top_k": -1}))


@pytest.mark.parametrize(
    ("sent", "echoed"), [("output0", "output0"), ("OUTPUT0", "OUTPUT0"), ("", "output0")]
)
def test_the_answer_is_the_generated_ids_under_the_name_asked_for(sent: str, echoed: str) -> None:
    body = {**INFER_BODY, "outputs": [{"name": sent, "parameters": {"binary_data": False}}]}
    answer = INFER.reply(parse(INFER, body), body, context()).result(
        [completion(steps(["a", ""], ids=[396, 2], finish=FinishReason.EOS))]
    )
    assert json.loads(answer) == {
        "id": "42",
        "outputs": [{"name": echoed, "shape": [1, 2], "datatype": "UINT32", "data": [396, 2]}],
    }
