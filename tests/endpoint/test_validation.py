"""The typed readers, the rules for prompts, stops and messages, and the sampling defaults."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint import validation
from endpoint.protocols.chat_messages import chat_messages
from endpoint.protocols.sampling import resolve_sampling
from endpoint.validation import Fields, Range, show
from engine.errors import GenerationRefused, InvalidRequest, ServerError
from engine.sampling_params import SamplingParams
from tests.endpoint.samples import VOCAB, model_info

ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(value=ANY)
def test_readers_take_their_type_and_refuse_every_other(value: Any) -> None:
    fields = Fields({"f": value})
    legal = {
        "boolean": isinstance(value, bool),
        "integer": type(value) is int and 1 <= value <= 5,
        "number": type(value) in (int, float) and 0 < value <= 1,
        "text": isinstance(value, str) and value != "",
        "array": isinstance(value, list),
        "object": False,
    }
    ranges = {"integer": Range(1, 5), "number": Range(0, 1, low_open=True)}
    for reader, accepted in legal.items():
        arguments = (ranges[reader],) if reader in ranges else ()
        if accepted:
            assert getattr(fields, reader)("f", *arguments) == value
        elif value is None:
            assert getattr(fields, reader)("f", *arguments) is None
        else:
            with pytest.raises(InvalidRequest, match="`f` is"):
                getattr(fields, reader)("f", *arguments)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 10**400])
def test_numbers_without_upper_bound_are_still_finite(value: float) -> None:
    with pytest.raises(InvalidRequest):
        Fields({"f": value}).number("f", validation.NOT_NEGATIVE)


def test_a_refusal_names_the_field_as_written_the_value_and_the_range() -> None:
    parameters = Fields({"parameters": {"top_p": 1.5}}).object("parameters")
    assert parameters is not None
    with pytest.raises(InvalidRequest) as caught:
        parameters.number("top_p", validation.UNIT_OPEN)
    assert str(caught.value) == (
        "`parameters.top_p` is 1.5, but must be a number in (0, 1); correct it or leave it out"
    )


@given(value=ANY | st.text(min_size=100) | st.integers(min_value=10**100))
def test_shown_values_are_short(value: Any) -> None:
    assert len(show(value)) <= 63


@pytest.mark.parametrize(
    ("legal", "text"),
    [
        (Range(0), "of at least 0"),
        (Range(0, low_open=True), "above 0"),
        (Range(0, 1), "in [0, 1]"),
        (Range(0, 1, True, True), "in (0, 1)"),
    ],
)
def test_ranges_write_themselves(legal: Range, text: str) -> None:
    assert str(legal) == text


# -- stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, ()),
        ([], ()),
        ("end", ("end",)),
        (["a", "b", "a"], ("a", "b")),
        ("x" * 32768, ("x" * 32768,)),
        (["x" * 1024], ("x" * 1024,)),
        (["x"] * 32768, ("x",)),
    ],
)
def test_legal_stops(stop: Any, expected: tuple[str, ...]) -> None:
    assert validation.stop_strings(Fields({"stop": stop})) == expected


@pytest.mark.parametrize(
    "stop",
    [
        "",
        [""],
        ["a", ""],
        [1],
        1,
        True,
        {},
        ["a", None],
        "x" * 32769,
        ["x" * 1025],
        ["x" * 1000] * 33,
        ["😀" * 513],
    ],
)
def test_illegal_stops(stop: Any) -> None:
    with pytest.raises(InvalidRequest, match="`stop`"):
        validation.stop_strings(Fields({"stop": stop}))


def test_stop_token_ids_are_merged_and_impossible_ones_dropped() -> None:
    ids = [5, -1, 2**31, 2**70, 5, VOCAB, 3]
    assert validation.stop_token_ids(Fields({"stop_token_ids": ids}), VOCAB) == (5, 3)
    for wrong in (5, "5", [1.0], [True], ["1"], [None]):
        with pytest.raises(InvalidRequest):
            validation.stop_token_ids(Fields({"stop_token_ids": wrong}), VOCAB)


def test_stop_token_ids_are_at_most_1024_different_ones() -> None:
    many = list(range(1024))
    assert len(validation.stop_token_ids(Fields({"stop_token_ids": many * 3}), VOCAB)) == 1024
    with pytest.raises(InvalidRequest, match="1024"):
        validation.stop_token_ids(Fields({"stop_token_ids": [*many, 1024]}), VOCAB)


# -- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], InvalidRequest),
        ([1.0], InvalidRequest),
        ([True], InvalidRequest),
        (["1"], InvalidRequest),
        ([1, None], InvalidRequest),
        ({}, InvalidRequest),
        ([0] * 1_048_577, InvalidRequest),
        ([-1], GenerationRefused),
        ([VOCAB], GenerationRefused),
        ([2**63], GenerationRefused),
    ],
)
def test_token_id_prompts(ids: Any, error: type[ServerError]) -> None:
    """A02, A16."""
    assert validation.token_ids(Fields({"p": [0, VOCAB - 1]}), "p", VOCAB) == (0, VOCAB - 1)
    with pytest.raises(error):
        validation.token_ids(Fields({"p": ids}), "p", VOCAB)


def test_text_parts_are_joined_without_separator() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    assert validation.joined_text(parts, "inputs") == "ab"


@pytest.mark.parametrize(
    "parts",
    [
        [],
        ["a"],
        [{"type": "text"}],
        [{"type": "text", "text": 1}],
        [{"text": "a"}],
        [{"type": "image_url", "image_url": {"url": "x"}}],
        5,
        None,
    ],
)
def test_other_parts_are_refused(parts: Any) -> None:
    with pytest.raises(InvalidRequest, match="inputs"):
        validation.joined_text(parts, "inputs")


def test_a_text_of_more_tokens_than_any_prompt_may_have_is_refused() -> None:
    validation.check_token_count(1_048_576)
    with pytest.raises(InvalidRequest, match="1048576"):
        validation.check_token_count(1_048_577)


def test_more_probabilities_of_prompts_than_an_answer_can_hold_are_refused() -> None:
    validation.check_prompt_logprobs(100_000, 0)
    validation.check_prompt_logprobs(4_761, 20)
    for num_tokens, num_others in ((100_001, 0), (4_762, 20)):
        with pytest.raises(GenerationRefused, match=r"`prompt_logprobs`.* at most 100000"):
            validation.check_prompt_logprobs(num_tokens, num_others)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_the_size_of_a_value_counts_every_string_and_every_value(value: Any) -> None:
    def size(part: Any) -> int:
        if isinstance(part, str):
            return 1 + len(part.encode("utf-16-le")) // 2
        if isinstance(part, list):
            return 1 + sum(map(size, part))
        return (
            1 + sum(size(name) + size(member) for name, member in part.items())
            if part and type(part) is dict
            else 1
        )

    assert not validation.is_larger(value, size(value))
    assert validation.is_larger(value, size(value) - 1)


def test_a_prompt_has_a_longest_length_in_utf16_units() -> None:
    fields = Fields({})
    half = validation.MAX_PROMPT_UNITS // 2
    validation.checked_prompt_text(fields, "p", "😀" * half)
    with pytest.raises(InvalidRequest, match="longer"):
        validation.checked_prompt_text(fields, "p", "😀" * half + "a")


# -- messages ----------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def messages_of(*messages: Any) -> list[dict[str, Any]]:
    return chat_messages(Fields({"messages": list(messages)}))


def test_messages_reach_the_template_in_one_form() -> None:
    given_messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be kind", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {"role": "assistant", "content": "hi", "tool_calls": None, "reasoning_content": "thinks"},
        {"role": "assistant", "content": "hi", "tool_calls": []},
    ]
    call = {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    assert messages_of(*given_messages) == [
        {"role": "system", "content": "be kind", "name": "n"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {"role": "assistant", "content": "hi", "reasoning_content": "thinks"},
        {"role": "assistant", "content": "hi"},
    ]
    assert given_messages[0]["role"] == "developer", "the body itself stays as it was"


def test_arguments_that_are_no_object_stay_text() -> None:
    for arguments in ("", "[1]", "not json", "[" * 100_000):
        call = {**CALL, "function": {"name": "f", "arguments": arguments}}
        message = messages_of({"role": "assistant", "tool_calls": [call]})[0]
        assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    "message",
    [
        "hi",
        None,
        {},
        {"content": "hi"},
        {"role": "robot", "content": "hi"},
        {"role": 1, "content": "hi"},
        {"role": ["user"], "content": "hi"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 1},
        {"role": "user", "content": []},
        {"role": "user", "content": {}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"role": "system", "content": True},
        {"role": "assistant"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": 5},
        {"role": "assistant", "content": 0, "tool_calls": [CALL]},
        {"role": "assistant", "content": False, "tool_calls": [CALL]},
        {"role": "assistant", "content": [], "tool_calls": [CALL]},
        {"role": "assistant", "content": {}, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "assistant", "tool_calls": {}},
        {"role": "assistant", "tool_calls": ["x"]},
        {"role": "assistant", "tool_calls": [{**CALL, "id": 1}]},
        {"role": "assistant", "tool_calls": [{**CALL, "type": "code"}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": "f"}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "a b", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f" * 65, "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "x"},
        {"role": "tool", "content": "x", "tool_call_id": ""},
        {"role": "tool", "content": "x", "tool_call_id": 7},
        {"role": "tool", "tool_call_id": "c1"},
    ],
)
def test_bad_messages_are_refused_by_place(message: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"`messages\[1\]"):
        messages_of({"role": "user", "content": "hi"}, message)


def big_call(size: int) -> dict[str, Any]:
    return {**CALL, "function": {"name": "f", "arguments": "x" * size}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x" * validation.MAX_PROMPT_UNITS}],
        [{"role": "assistant", "tool_calls": [big_call(validation.MAX_PROMPT_UNITS)]}],
        [{"role": "user", "content": "x", "name": "x" * validation.MAX_PROMPT_UNITS}],
        [{"role": "user", "content": "😀" * (validation.MAX_PROMPT_UNITS // 2)}],
    ],
)
def test_a_conversation_is_limited_wherever_its_text_is(messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="longer than"):
        messages_of(*messages)


@pytest.mark.parametrize("value", [None, [], {}, "hi", 1])
def test_messages_must_be_a_list_with_something_in_it(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="`messages`"):
        chat_messages(Fields({"messages": value}))


# -- sampling defaults -------------------------------------------------------------------------------


def resolve(generation_defaults: dict[str, Any] | None = None, **asked: Any) -> SamplingParams:
    return resolve_sampling(
        model_info(**(generation_defaults or {})), **{"max_tokens": 10, "seed": 1, **asked}
    )


SAMPLES = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def test_a_bare_request_is_greedy() -> None:
    assert resolve() == SamplingParams(max_tokens=10, seed=1, reproducible=True)


@pytest.mark.parametrize("asked", [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"do_sample": True}])
def test_any_sampling_field_turns_sampling_on(asked: dict[str, Any]) -> None:
    params = resolve(**asked)
    assert params.temperature == asked.get("temperature", 1.0)
    assert params.top_k == asked.get("top_k", 0)
    assert params.top_p == asked.get("top_p", 1.0)


@pytest.mark.parametrize(
    "asked", [{"do_sample": False, "temperature": 0.5, "top_p": 0.5}, {"temperature": 0.0, "top_k": 5}]
)
def test_greedy_on_request_wins_over_everything(asked: dict[str, Any]) -> None:
    for defaults in ({}, SAMPLES):
        params = resolve(defaults, **asked)
        assert params.greedy and params.top_k == 0 and params.top_p == 1.0


def test_the_models_generation_config_fills_in_what_is_not_sent() -> None:
    params = resolve(SAMPLES)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.7, 20, 0.8, 1.05)
    params = resolve(SAMPLES, temperature=0.2, repetition_penalty=1.0)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.2, 20, 0.8, 1.0)


@pytest.mark.parametrize("switch", [{"do_sample": False}, {"do_sample": None}])
def test_a_generation_config_that_does_not_sample_still_has_the_defaults_of_a_request_that_does(
    switch: dict[str, Any],
) -> None:
    quiet = {**SAMPLES, **switch}
    assert resolve(quiet).greedy
    for asked in ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}, {"branches": 2, "top_p": 0.5}):
        params = resolve(quiet, **asked)
        assert (params.temperature, params.top_k, params.top_p) == (0.7, 20, 0.5)


def test_several_candidates_are_sampled() -> None:
    assert resolve(branches=2).temperature == 1.0 and resolve(branches=2).branches == 2
    assert resolve(branches=2, do_sample=False).greedy


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_repetition_penalty_never_makes_a_logit_infinite(penalty: float) -> None:
    used = resolve(repetition_penalty=penalty).repetition_penalty
    assert 1e-6 <= used <= 1e6 and (used == penalty or not 1e-6 <= penalty <= 1e6)


@pytest.mark.parametrize("wrong", ["1", -1, None, [], True, math.nan])
def test_unusable_values_of_the_generation_config_are_as_none(wrong: Any) -> None:
    params = resolve({**dict.fromkeys(SAMPLES, wrong), "do_sample": True})
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (1.0, 0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("defaults", "asked", "used"),
    [({}, 5000, 1000), ({}, -1, 0), ({}, 0, 0), ({"top_k": 50}, 100, 50), (SAMPLES, 0, 0)],
)
def test_top_k_is_lowered_to_the_models_cap(defaults: dict[str, Any], asked: int, used: int) -> None:
    assert resolve(defaults, top_k=asked).top_k == used


def test_max_tokens_is_lowered_and_seeds_are_drawn() -> None:
    assert resolve(max_tokens=10**9).max_tokens == 512
    seeds = {resolve(seed=None).seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)
    assert resolve(seed=0).seed == 0


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_sampling_row_never_has_a_temperature_that_looks_greedy(temperature: float) -> None:
    assert resolve(temperature=temperature).temperature >= 1e-3
