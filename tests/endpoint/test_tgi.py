"""TGI's three routes against the examples of the reference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from endpoint.protocols.base import FinishReason, GenerationRequest
from endpoint.protocols.tgi import TGIGenerate, TGIGenerateStream, TGIRoot
from engine.errors import InvalidRequest, RequestTimeout
from tests.endpoint.samples import completion, context, model_info, payload, steps, stream

ADAPTERS = [TGIGenerate(), TGIGenerateStream(), TGIRoot()]
NAMES = [adapter.name for adapter in ADAPTERS]


def parse(
    adapter: Any = ADAPTERS[0], body: dict[str, Any] | None = None, **parameters: Any
) -> GenerationRequest:
    request: GenerationRequest = adapter.parse(
        {"inputs": "hi", "parameters": parameters, **(body or {})}, model_info(), {}
    )
    return request


def reply(adapter: Any = ADAPTERS[0], parameters: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    body = {"inputs": "hi", "parameters": {"seed": 42, **(parameters or {})}}
    return adapter.reply(adapter.parse(body, model_info(), {}), body, context(**kwargs))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_every_parameter_is_read(adapter: Any) -> None:
    request = parse(
        adapter, temperature=0.5, top_k=3, top_p=0.9, typical_p=0.5, do_sample=True, seed=2**64 - 1,
        repetition_penalty=3.5, frequency_penalty=-2, stop=["a", "b"], truncate=5, max_new_tokens=7,
        details=True, return_full_text=True, watermark=True, adapter_id="llama",
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 0.9, 2**64 - 1)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.max_tokens) == (3.5, -2.0, 7)
    assert (request.stop, request.keep_last) == (("a", "b"), 5)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_defaults_nulls_and_ignored_fields(adapter: Any) -> None:
    bare = parse(adapter, seed=1)
    assert bare.sampling.greedy and bare.sampling.max_tokens == 20 and bare.keep_last is None
    # what text-generation and the hub client send
    nulls = [
        "repetition_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "truncate", "typical_p",
        "best_of", "top_n_tokens", "grammar", "max_new_tokens", "do_sample", "details", "watermark",
        "return_full_text", "decoder_input_details", "adapter_id",
    ]  # fmt: skip
    others = {"stop": [], "best_of": 3, "top_n_tokens": "x", "grammar": {}, "ignore_eos": 1, "n": 0}
    assert parse(adapter, seed=1, **{**dict.fromkeys(nulls), **others}) == bare
    assert parse(adapter, {"parameters": None}).sampling.max_tokens == 20


def test_only_the_route_or_the_stream_field_of_the_root_makes_a_stream() -> None:
    for sent in (True, False, None):
        streams = [parse(adapter, {"stream": sent}).stream for adapter in ADAPTERS]
        assert streams == [False, True, sent is True]
    with pytest.raises(InvalidRequest, match="`stream`"):
        parse(ADAPTERS[2], {"stream": 1})


BAD: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [0, -1, 2**31, 1.0, "1", True]),
    ("temperature", [0, -1, "1", True]),
    ("top_k", [0, -1, 2**31, 1.0]),
    ("top_p", [0, 1, 1.0, "1", -0.5]),
    ("typical_p", [0, 1.1]),
    ("do_sample", [1, "true"]),
    ("seed", [-1, 2**64, 1.0, "1"]),
    ("repetition_penalty", [0, -1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("stop", ["", [""], 1, "x" * 1025, ["x"] * 1025, ["x" * 1025], ["x" * 1000] * 33]),
    ("truncate", [0, -1, 1.0]),
    ("return_full_text", [1]),
    ("details", [1, "true"]),
    ("decoder_input_details", [1]),
    ("watermark", [1]),
    ("adapter_id", ["", "a b", "unknown", 1, "x" * 257]),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
@pytest.mark.parametrize(("field", "values"), BAD, ids=[field for field, _ in BAD])
def test_a_wrong_parameter_is_refused_by_its_full_name(adapter: Any, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=f"`parameters.{field}`"):
            parse(adapter, **{field: value})


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
@pytest.mark.parametrize(
    "inputs", [None, "", 5, [], {}, [1], [{"type": "text", "text": ""}], [{"type": "image"}]]
)
def test_bad_inputs(adapter: Any, inputs: Any) -> None:
    with pytest.raises(InvalidRequest, match="`inputs"):
        parse(adapter, {"inputs": inputs})
    for parameters in ([], "x", 1, True):
        with pytest.raises(InvalidRequest, match="`parameters`"):
            parse(adapter, {"parameters": parameters})


def test_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(body={"inputs": parts}).prompt == "ab"


def test_a_stream_cannot_show_the_prompts_tokens() -> None:
    for adapter, body in ((ADAPTERS[1], {}), (ADAPTERS[2], {"stream": True})):
        with pytest.raises(InvalidRequest, match=r"`parameters\.decoder_input_details`"):
            parse(adapter, body, decoder_input_details=True)


# -- answers -----------------------------------------------------------------------------------------


def test_the_bare_answer_and_the_list_of_the_root() -> None:
    answer = completion(steps(["a", "b"]))
    assert reply().result([answer]) == b'{"generated_text":"ab"}'
    assert reply(ADAPTERS[2]).result([answer]) == b'[{"generated_text":"ab"}]'


def test_details() -> None:
    answer = completion(steps(["\n", "x"], ids=[13, 14]))
    assert json.loads(reply(parameters={"details": True}, prompt_tokens=7).result([answer])) == {
        "details": {
            "prompt_tokens": 7,
            "finish_reason": "length",
            "generated_tokens": 2,
            "prefill": [],
            "seed": 42,
            "tokens": [
                {"id": token_id, "logprob": None, "special": None, "text": None} for token_id in (13, 14)
            ],
        },
        "generated_text": "\nx",
    }


def test_decoder_input_details_imply_details_and_show_the_prompts_tokens() -> None:
    asked = reply(parameters={"decoder_input_details": True}, prompt_tokens=3, prompt_ids=[1, 5, 9])
    details = json.loads(asked.result([completion(steps(["x"]))]))["details"]
    assert [token["id"] for token in details["prefill"]] == [1, 5, 9] and len(details["tokens"]) == 1


def test_return_full_text() -> None:
    full = {"return_full_text": True}
    answer = steps(["am", " I"])
    body = json.loads(reply(parameters=full, prompt_text="Who").result([completion(answer)]))
    assert body == {"generated_text": "Who am I"}
    last = payload(stream(reply(ADAPTERS[1], full, prompt_text="Who"), answer)[-1])
    assert last["generated_text"] == "Who am I" and last["token"]["text"] == " I"


@pytest.mark.parametrize("adapter", ADAPTERS[1:], ids=NAMES[1:])
def test_the_stream_of_the_reference(adapter: Any) -> None:
    frames = stream(
        reply(adapter, {"details": True}, prompt_tokens=7), steps(["\n", "x", ""], ids=[13, 14, 2])
    )
    token = '"logprob":null,"special":null}'
    assert frames == [
        f'data: {{"token":{{"id":[13],"text":"\\n",{token},"generated_text":null,"details":null}}\n\n',
        f'data: {{"token":{{"id":[14],"text":"x",{token},"generated_text":null,"details":null}}\n\n',
        f'data: {{"token":{{"id":[2],"text":"",{token},"generated_text":"\\nx","details":{{"prompt_tokens":7,'
        '"finish_reason":"length","generated_tokens":3,"seed":42}}\n\n',
    ]
    assert payload(stream(reply(adapter), steps(["a"]))[-1])["details"] is None


def test_full_text_frames() -> None:
    frames = [payload(f) for f in stream(reply(ADAPTERS[1], full_text=True), steps(["a", "b", "c"]))]
    assert [frame["token"]["text"] for frame in frames] == ["a", "ab", "abc"]
    assert [frame["generated_text"] for frame in frames] == [None, None, "abc"]


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
    asked = {"details": True}
    whole = json.loads(reply(parameters=asked).result([completion(answer)]))
    assert whole["details"]["finish_reason"] == worded
    assert payload(stream(reply(ADAPTERS[1], asked), answer)[-1])["details"]["finish_reason"] == worded


def test_the_reported_seed_is_the_one_used() -> None:
    body = {"inputs": "hi", "parameters": {"details": True, "temperature": 1.0}}
    request = ADAPTERS[0].parse(body, model_info(), {})
    answer = ADAPTERS[0].reply(request, body, context()).result([completion(steps(["a"]))])
    assert json.loads(answer)["details"]["seed"] == request.sampling.seed


def test_an_error_ends_the_stream_without_a_terminator() -> None:
    (frame,) = reply(ADAPTERS[1]).error_frames(RequestTimeout("Engine callback timeout: x"))
    assert payload(frame.decode())["error"] == "Engine callback timeout: x"
