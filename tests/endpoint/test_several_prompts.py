"""Several prompts in one request, echo, and log-probabilities of prompts: what is read, what is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from endpoint.protocols.base import Body, GenerationRequest, PromptList, PromptToken, TokenLogprob, TokenStep
from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.protocols.openai_completions import OpenAICompletions
from engine.errors import GenerationRefused, InvalidRequest, ServerError
from tests.endpoint.samples import VOCAB, completion, context, interleaved, model_info, payload, steps, stream

ADAPTER = OpenAICompletions()
CHAT = OpenAIChat()
MESSAGES = [{"role": "user", "content": "hi"}]


def parse(**members: Any) -> GenerationRequest:
    return ADAPTER.parse({"model": "m", "prompt": "who are you", **members}, model_info("m"), {})


def reply(body: Body, **kwargs: Any) -> Any:
    return ADAPTER.reply(parse(**body), body, context(model="m", **kwargs))


@pytest.mark.parametrize(
    "prompts",
    [["a", "b"], ["a", "a", "a"], [[1, 2], [3]], [[0], [VOCAB - 1]], [f"p{i}" for i in range(100)]],
)
def test_lists_of_prompts(prompts: list[Any]) -> None:
    request = parse(prompt=prompts, n=2)
    expected = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)
    assert request.prompt == PromptList(expected) and request.prompts == expected
    assert (request.n, request.sampling.branches, request.num_choices) == (2, 2, 2 * len(prompts))


@pytest.mark.parametrize(
    ("members", "field"),
    [({"n": 3}, "n"), ({"n": 1, "best_of": 3}, "best_of"), ({"n": 3, "use_beam_search": True}, "n")],
)
def test_prompts_and_their_choices_have_a_limit_together(members: dict[str, Any], field: str) -> None:
    prompts = ["p"] * 66
    assert parse(prompt=prompts, **members).sampling.branches == 3
    with pytest.raises(InvalidRequest, match=rf"`{field}` is 3, but must be at most 2 for 67 prompts"):
        parse(prompt=[*prompts, "p"], **members)
    assert len(parse(prompt=["p"] * 200).prompts) == 200, "one choice of each always fits"


@pytest.mark.parametrize("prompt", ["a", ["a"], [[5, 6]], [5, 6]])
def test_one_prompt_is_one_however_it_is_wrapped(prompt: Any) -> None:
    request = parse(prompt=prompt, n=3)
    assert not isinstance(request.prompt, PromptList)
    assert request.prompts == (request.prompt,) and request.num_choices == 3


@pytest.mark.parametrize(
    ("prompt", "error", "field"),
    [
        (["a", ""], InvalidRequest, "prompt[1]"),
        (["a", None], InvalidRequest, "prompt[1]"),
        (["a", 5], InvalidRequest, "prompt[1]"),
        (["a", [5]], InvalidRequest, "prompt[1]"),
        ([[5], "a"], InvalidRequest, "prompt[1]"),
        ([[5], 6], InvalidRequest, "prompt[1]"),
        ([[5], []], InvalidRequest, "prompt[1]"),
        ([[5], [6.0]], InvalidRequest, "prompt[1]"),
        ([[5], [True]], InvalidRequest, "prompt[1]"),
        ([[[5]]], InvalidRequest, "prompt[0]"),
        ([5, "a"], InvalidRequest, "prompt"),
        ([5, [6]], InvalidRequest, "prompt"),
        ([[5], [VOCAB]], GenerationRefused, "prompt[1]"),
        ([[5], [-1]], GenerationRefused, "prompt[1]"),
        (["a"] * 201, InvalidRequest, "prompt"),
    ],
)
def test_bad_lists(prompt: Any, error: type[ServerError], field: str) -> None:
    with pytest.raises(error) as caught:
        parse(prompt=prompt)
    assert f"`{field}`" in str(caught.value)


def test_all_prompts_together_are_no_longer_than_one_may_be() -> None:
    with pytest.raises(InvalidRequest, match=r"`prompt`.* in all"):
        parse(prompt=["x" * 2_100_000] * 2)


ANSWERS = [steps([f"{letter}1", f"{letter}2"], queue_waits_us=[i, i]) for i, letter in enumerate("abcd")]
BODY: Body = {"prompt": ["p", "q"], "n": 2, "echo": True}
TWO: dict[str, Any] = {"prompt_tokens": 7, "echoes": ["P:", "Q:"], "prompt_lengths": [3, 4]}


def test_choices_are_numbered_through_and_echo_their_own_prompt() -> None:
    answer = json.loads(reply(BODY, **TWO).result([completion(of) for of in ANSWERS]))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["P:a1a2", "P:b1b2", "Q:c1c2", "Q:d1d2"]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 8, 15)
    assert usage["queue_wait_time"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_cached_tokens_are_counted_once_per_prompt() -> None:
    def told(usage: Any) -> int:
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached = {**TWO, "cached_tokens": [2, 0]}
    whole = json.loads(reply(BODY, **cached).result([completion(of) for of in ANSWERS]))
    assert told(whole["usage"]) == 2
    *frames, _ = stream(reply(BODY, **cached), interleaved(ANSWERS))
    by_choice = {f["choices"][0]["index"]: told(f["usage"]) for f in map(payload, frames) if "usage" in f}
    assert by_choice == {0: 2, 1: 2, 2: 0, 3: 0}


def test_candidates_that_were_not_chosen_are_counted_behind_all_choices() -> None:
    body = {**BODY, "best_of": 3}
    more = [completion(of) for of in [*ANSWERS, *ANSWERS[:2]]]
    answer = json.loads(reply(body, **TWO).result(more))
    assert len(answer["choices"]) == 4 and answer["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("include_usage", [False, True])
def test_streamed_choices(include_usage: bool) -> None:
    body = {**BODY, "stream_options": {"include_usage": include_usage}}
    *frames, done = stream(reply(body, **TWO), interleaved(ANSWERS))
    assert done == "data: [DONE]\n\n"
    totals = payload(frames.pop()) if include_usage else None
    texts, usages = [""] * 4, {}
    for frame in map(payload, frames):
        (choice,) = frame["choices"]
        texts[choice["index"]] += choice["text"]
        usages[choice["index"]] = frame.get("usage")
    assert texts == ["P:a1a2", "P:b1b2", "Q:c1c2", "Q:d1d2"]
    if totals is not None:
        assert totals["usage"]["prompt_tokens"] == 7 and totals["usage"]["completion_tokens"] == 8
        assert set(usages.values()) == {None}
    else:  # each choice counts its own prompt
        assert [usages[i]["prompt_tokens"] for i in range(4)] == [3, 3, 4, 4]


def test_beams_of_all_prompts_are_in_one_frame() -> None:
    body = {**BODY, "use_beam_search": True}
    (frame,) = reply(body, **TWO).beam_frames([completion(of) for of in ANSWERS])
    answer = payload(frame.decode())
    assert [choice["text"] for choice in answer["choices"]] == ["P:a1a2", "P:b1b2", "Q:c1c2", "Q:d1d2"]
    assert answer["usage"]["prompt_tokens"] == 7 and answer["usage"]["completion_tokens"] == 8


# -- log-probabilities of the prompt -------------------------------------------------------------------


def scored(text: str, rank: int, logprob: float, others: Sequence[tuple[int, str, float]]) -> PromptToken:
    return PromptToken(TokenLogprob(50, text, logprob), rank, tuple(TokenLogprob(*other) for other in others))


PROMPT = [
    scored("A", 0, 0.0, []),
    scored(" b", 1, -0.1, [(60, "x", -1.0), (61, "y", -2.0), (62, "z", -3.0)]),
    scored(" c", 3, -2.0, [(60, "x", -0.5), (61, "y", -1.0), (62, "z", -3.0)]),
    scored(" d", 900, -9.0, [(60, "x", -0.5), (61, "y", -1.0), (62, "z", -3.0)]),
]


def with_prompt(of: Sequence[TokenStep]) -> list[TokenStep]:
    return [replace(of[0], prompt=PROMPT), *of[1:]]


def test_prompt_logprobs_name_the_own_token_first_and_then_the_others() -> None:
    body = {"prompt_logprobs": 3}
    choice = json.loads(reply(body).result([completion(with_prompt(steps(["a"])))]))["choices"][0]
    first, b, c, d = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    assert next(iter(b.items())) == ("50", {"logprob": -0.1, "rank": 1, "decoded_token": " b"})
    assert [[(key, entry["rank"]) for key, entry in member.items()] for member in (b, c, d)] == [
        [("50", 1), ("60", 2), ("61", 3), ("62", 4)],
        [("50", 3), ("60", 1), ("61", 2), ("62", 4)],
        [("50", 900), ("60", 1), ("61", 2), ("62", 3)],
    ]


def test_as_many_others_as_were_asked_for_even_if_more_are_known() -> None:
    for asked in range(4):
        answer = with_prompt(steps(["a"]))
        choice = json.loads(reply({"prompt_logprobs": asked}).result([completion(answer)]))["choices"][0]
        assert [len(member) for member in choice["prompt_logprobs"][1:]] == [1 + asked] * 3


def test_chat_has_them_at_top_level() -> None:
    body = {"model": "m", "messages": MESSAGES, "prompt_logprobs": 1}
    request = CHAT.parse(body, model_info("m"), {})
    assert request.sampling.prompt_logprobs == 1
    whole = CHAT.reply(request, body, context(model="m")).result([completion(with_prompt(steps(["a"])))])
    answer = json.loads(whole)
    assert len(answer["prompt_logprobs"]) == 4 and "prompt_logprobs" not in answer["choices"][0]


@pytest.mark.parametrize("value", [-1, 21, True, "1", 1.0])
def test_their_number_is_checked(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="`prompt_logprobs`"):
        parse(prompt_logprobs=value)


@pytest.mark.parametrize("value", [0, 20])
def test_a_stream_has_none(value: int) -> None:
    assert parse(prompt_logprobs=value).sampling.prompt_logprobs == value
    with pytest.raises(InvalidRequest, match=r"`prompt_logprobs`.*`stream`"):
        parse(prompt_logprobs=value, stream=True)


def test_only_who_echoes_logprobs_asks_for_the_prompts() -> None:
    assert parse(logprobs=2).sampling.prompt_logprobs == -1
    assert parse(echo=True).sampling.prompt_logprobs == -1
    assert parse(echo=True, logprobs=2).sampling.prompt_logprobs == 2
    assert parse(echo=True, logprobs=2, prompt_logprobs=4).sampling.prompt_logprobs == 4


@pytest.mark.parametrize("streamed", [False, True])
def test_an_echo_with_logprobs_lists_the_prompt_too(streamed: bool) -> None:
    answer = with_prompt(steps([" e", "f"], logprobs=[(" e", -0.2, [("x", -1.0)]), ("f", -0.3, [])]))
    body = {"echo": True, "logprobs": 2}
    made = reply(body, echoes=["A b c d"], prompt_lengths=[4])
    lists: dict[str, list[Any]] = {}
    if streamed:
        for frame in stream(made, answer)[:-1]:
            for name, values in payload(frame)["choices"][0]["logprobs"].items():
                lists.setdefault(name, []).extend(values)
    else:
        lists = json.loads(made.result([completion(answer)]))["choices"][0]["logprobs"]
    assert lists["tokens"] == ["A", " b", " c", " d", " e", "f"]
    assert lists["text_offset"] == [0, 1, 3, 5, 7, 9]
    assert lists["token_logprobs"] == [None, -0.1, -2.0, -9.0, -0.2, -0.3]
    first, b, c, d, *_ = lists["top_logprobs"]
    assert first is None
    assert [list(member) for member in (b, c, d)] == [[" b", "x"], [" c", "x", "y"], [" d", "x", "y"]]


def test_offsets_run_on_over_echoed_choices() -> None:
    answer = with_prompt(steps(["ef"], logprobs=[("ef", -0.2, [])]))
    body = {"prompt": ["p", "q"], "echo": True, "logprobs": 0}
    made = reply(body, **TWO).result([completion(answer), completion(answer)])
    first, second = (choice["logprobs"]["text_offset"] for choice in json.loads(made)["choices"])
    assert first == [0, 1, 3, 5, 7] and second == [9, 10, 12, 14, 16]
