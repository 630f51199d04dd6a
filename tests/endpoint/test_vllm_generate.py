"""POST /generate with `prompt`: bodies in, NUL-ended records out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint.protocols.base import GenerationRequest, TokenStep
from endpoint.protocols.registry import load_adapters
from endpoint.protocols.vllm_generate import VllmGenerate
from engine.errors import InvalidRequest, RequestTimeout
from tests.endpoint.samples import completion, context, interleaved, model_info, steps

ADAPTER = VllmGenerate()


def parse(**members: Any) -> GenerationRequest:
    return ADAPTER.parse({"prompt": "hi", **members}, model_info(), {})


def reply(members: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return ADAPTER.reply(parse(**(members or {})), members or {}, context(**kwargs))


def records(answer: Any, of: list[TokenStep]) -> list[list[str]]:
    sent = [frame for frame in map(answer.frame, of) if frame]
    assert all(frame.endswith(b"\0") and frame.count(b"\0") == 1 for frame in sent)
    assert answer.tail() == ()
    texts = [json.loads(frame[:-1]) for frame in sent]
    assert all(set(record) == {"text"} for record in texts)
    return [record["text"] for record in texts]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"prompt": "a"}, "vllm_generate"),
        ({"prompt": "a", "inputs": "b"}, "vllm_generate"),
        ({"prompt": "", "inputs": "b"}, "vllm_generate"),
        ({"inputs": "b"}, "tgi_generate"),
        ({"prompt": None, "inputs": "b"}, "tgi_generate"),
        ({}, "tgi_generate"),
    ],
)
def test_the_body_decides_which_dialect_of_generate_it_is(body: dict[str, Any], name: str) -> None:
    adapters = [adapter for adapter in load_adapters() if "/generate" in adapter.routes]
    assert next(adapter.name for adapter in adapters if adapter.claims(body)) == name


@pytest.mark.parametrize("members", [{"n": 2}, {"best_of": 2}, {"best_of": 2, "stream": True}])
def test_asynchronous_scheduling_serves_one_answer_per_prompt(members: dict[str, Any]) -> None:
    parse(**members)
    with pytest.raises(InvalidRequest, match="MINDIE_ASYNC_SCHEDULING_ENABLE=1"):
        ADAPTER.parse({"prompt": "hi", **members}, replace(model_info(), one_answer=True), {})


def test_defaults_and_ignored_fields() -> None:
    bare = parse(seed=1)
    assert bare.sampling.greedy and bare.sampling.max_tokens == 512 and (bare.stream, bare.n) == (False, 1)
    ignored = {"logprobs": "x", "use_beam_search": 1, "min_p": 7, "logit_bias": 1, "response_format": 1}
    assert parse(seed=1, **ignored) == bare
    read = [
        "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "n", "best_of", "stream", "stop", "stop_token_ids", "include_stop_str_in_output",
        "skip_special_tokens", "ignore_eos", "model",
    ]  # fmt: skip
    assert parse(seed=1, **dict.fromkeys(read)) == bare


@pytest.mark.parametrize("model", ["None", "llama", None])
def test_names_of_the_base_model(model: str | None) -> None:
    parse(model=model)


def test_sampling_and_stops() -> None:
    request = parse(
        temperature=0.5, top_k=-1, top_p=1.0, seed=3, max_tokens=9, repetition_penalty=1.1, stop="x",
        presence_penalty=1, frequency_penalty=-1, include_stop_str_in_output=True, skip_special_tokens=False,
        ignore_eos=True, stop_token_ids=[4],
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 0, 1.0, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert (sampling.max_tokens, sampling.stop_token_ids, sampling.ignore_eos) == (9, (4,), True)
    assert (request.stop, request.include_stop, request.skip_special_tokens) == (("x",), True, False)
    assert parse(temperature=0, top_k=0).sampling.greedy
    assert parse(prompt=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]).prompt == "ab"


BAD: list[tuple[str, list[Any]]] = [
    ("prompt", [None, "", 1, [], [1], {}, [{"type": "image_url", "image_url": "x"}]]),
    ("model", ["", "other", 1]),
    ("max_tokens", [0, 2**31, 1.0, "1", True]),
    ("temperature", [-1, "1", True]),
    ("top_k", [-2, 2**31, 1.0]),
    ("top_p", [0, 1.1, "1"]),
    ("seed", [-1, 2**64, 1.0]),
    ("repetition_penalty", [0, 2.1]),
    ("presence_penalty", [-2.1]),
    ("frequency_penalty", [2.1]),
    ("n", [0, 129, "1"]),
    ("best_of", [0, 129]),
    ("stream", [1, "true"]),
    ("stop", ["", [""], 1]),
    ("stop_token_ids", [1, ["1"]]),
    ("ignore_eos", [1]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD for value in values])
def test_a_wrong_type_or_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"`{field}"):
        parse(**{field: value})


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"n": 2}, (2, 2, -1)),
        ({"n": 2, "best_of": 3}, (2, 3, 0)),
        ({"n": 2, "best_of": 3, "stream": True}, (2, 2, -1)),
    ],
)
def test_candidates(members: dict[str, Any], expected: tuple[int, int, int]) -> None:
    request = parse(**members)
    assert (request.n, request.sampling.branches, request.sampling.logprobs) == expected
    assert request.sampling.temperature == 1.0
    with pytest.raises(InvalidRequest, match="`best_of`"):
        parse(n=2, best_of=1)
    with pytest.raises(InvalidRequest, match="`temperature`"):
        parse(n=2, temperature=0)


# -- answers -----------------------------------------------------------------------------------------


def test_the_answer_of_the_reference() -> None:
    body = reply(prompt_text="My name is Olivier and I").result(
        [completion(steps(["am", " a", " Frenchman"]))]
    )
    assert body == b'{"text":["My name is Olivier and I am a Frenchman"]}'
    assert reply(prompt_text="and I").result([completion(steps([" am"]))]) == b'{"text":["and I am"]}'


def test_the_stream_of_the_reference() -> None:
    frames = [reply().frame(step) for step in steps(["am", " a"])]
    assert b"".join(frames) == b'{"text":["am"]}\0{"text":[" a"]}\0'


def test_a_record_has_one_text_per_choice_and_an_empty_one_of_a_finished_choice() -> None:
    of = interleaved([steps(["a", "b", "c"]), steps(["x"])])
    assert records(reply({"n": 2}), of) == [["a", "x"], ["b", ""], ["c", ""]]
    assert records(reply({"n": 2}, full_text=True), of) == [["a", "x"], ["ab", ""], ["abc", ""]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_whatever_the_order_of_the_steps_the_records_join_to_the_texts(
    lengths: list[int], random: Any
) -> None:
    choices = [steps([f"{choice}.{i} " for i in range(length)]) for choice, length in enumerate(lengths)]
    numbered = interleaved(choices)
    order = [choice for choice, length in enumerate(lengths) for _ in range(length)]
    random.shuffle(order)
    queues = {choice: [s for s in numbered if s.choice == choice] for choice in range(len(lengths))}
    of = [queues[choice].pop(0) for choice in order]
    sent = records(reply({"n": len(lengths)}), of)
    assert ["".join(texts) for texts in zip(*sent, strict=True)] == [c[-1].full_text for c in choices]
    assert len(sent) >= max(lengths)


def test_only_the_chosen_candidates_are_answered() -> None:
    answers = [completion(steps([text])) for text in "abc"]
    body = reply({"n": 2, "best_of": 3}, prompt_text="p").result(answers)
    assert json.loads(body) == {"text": ["p a", "p b"]}


def test_an_error_is_a_record_too() -> None:
    (frame,) = reply().error_frames(RequestTimeout("Engine callback timeout: x"))
    assert frame.endswith(b"\0") and json.loads(frame[:-1])["error"] == "Engine callback timeout: x"
