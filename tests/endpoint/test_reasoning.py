"""Reasoning told apart from the answer, whoever began it and wherever the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoint.reasoning import Opening, ReasoningSplitter, find_opening, find_opening_within


def split(opening: Opening, *pieces: str) -> tuple[str, str]:
    splitter = ReasoningSplitter(opening)
    reasoning = content = ""
    for index, piece in enumerate(pieces, 1):
        more_reasoning, more_content = splitter.push(piece, last=index == len(pieces))
        assert not (content and more_reasoning), "reasoning comes first"
        reasoning, content = reasoning + more_reasoning, content + more_content
    return reasoning, content


# opening, text, reasoning, content
SPLITS = [
    (Opening.MODEL, "<think>\nhm\n</think>\n\nYes.", "hm\n", "Yes."),
    (Opening.MODEL, "\n <think>a</think>b", "a", "b"),
    (Opening.MODEL, "<think>", "", ""),
    (Opening.MODEL, "<think>a</thin", "a</thin", ""),
    (Opening.MODEL, "<thinking>a</think>", "", "<thinking>a</think>"),
    (Opening.MODEL, " <thi", "", " <thi"),
    (Opening.MODEL, "No.<think>a</think>", "", "No.<think>a</think>"),
    (Opening.MODEL, "", "", ""),
    (Opening.MODEL, " " * 200 + "<think>", "", " " * 200 + "<think>"),
    (Opening.PROMPT, "hm <b> </ </think>\nYes.", "hm <b> </ ", "Yes."),
    (Opening.PROMPT, "</think></think>x", "", "</think>x"),
    (Opening.PROMPT, "a < b", "a < b", ""),
    (Opening.PROMPT, "<think>a</think>b", "<think>a", "b"),
    (Opening.NOBODY, "\n<think>a</think>", "", "\n<think>a</think>"),
]


@pytest.mark.parametrize(("opening", "text", "reasoning", "content"), SPLITS)
def test_the_parts_do_not_depend_on_the_cuts(
    opening: Opening, text: str, reasoning: str, content: str
) -> None:
    assert split(opening, text) == (reasoning, content)
    assert split(opening, *text, "") == (reasoning, content)
    for cut in range(len(text) + 1):
        assert split(opening, text[:cut], text[cut:]) == (reasoning, content)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(Opening),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", " ", "\n", "ab", "k>"])),
)
def test_any_text_gives_the_same_parts_however_it_comes(opening: Opening, pieces: list[str]) -> None:
    text = "".join(pieces)
    reasoning, content = split(opening, text)
    assert split(opening, *pieces, "") == (reasoning, content)
    assert content in text and reasoning in text


@pytest.mark.parametrize(
    ("text", "most"), [(" " * 300, 64), ("<think>" + "</thin" * 50, 15), ("<think>" + "<" * 300, 8)]
)
def test_A33_what_is_held_back_is_bounded(text: str, most: int) -> None:
    splitter = ReasoningSplitter(Opening.MODEL)
    sent = sum(len(part) for char in text for part in splitter.push(char))
    assert len(text) - sent <= most


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        (["<think>", "a", "b", "</think>", "c"], 4),
        (["<th", "ink>a", "</thi", "nk>", "c", "d"], 4),
        (["<think>", "a", "b"], 3),
        (["no", "thing"], 0),
    ],
)
def test_tokens_are_counted_up_to_the_end_of_reasoning(pieces: list[str], tokens: int) -> None:
    splitter = ReasoningSplitter(Opening.MODEL)
    for piece in pieces:
        splitter.push(piece)
    splitter.push("", last=True, is_token=False)
    assert splitter.tokens == tokens


@pytest.mark.parametrize(
    ("prompt_end", "opening"),
    [
        ("<|Assistant|><think>\n", Opening.PROMPT),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Opening.NOBODY),
        ("<|im_start|>assistant\n", Opening.MODEL),
        ("", Opening.MODEL),
    ],
)
def test_the_prompt_tells_who_begins(prompt_end: str, opening: Opening) -> None:
    assert find_opening(prompt_end) is opening


@pytest.mark.parametrize(
    ("answer", "opening"),
    [
        ("Yes", Opening.NOBODY),
        ("<think>hm", Opening.PROMPT),
        ("<think>hm</think>Yes", Opening.NOBODY),
        ("<think>", Opening.PROMPT),
    ],
)
def test_an_answer_that_is_gone_on_with_tells_where_it_is(answer: str, opening: Opening) -> None:
    assert find_opening_within(answer) is opening
