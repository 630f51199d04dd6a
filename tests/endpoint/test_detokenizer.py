"""Joined pieces are the whole text, and no piece is sent too early."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from endpoint.detokenizer import IncrementalDetokenizer, StopStrings, TextDelta
from endpoint.tokenizer import TokenizerPool
from tests.endpoint import tiny_tokenizers

FAMILIES = ["byte_level", "sentencepiece"]
PIECES = [
    "hello",
    " world",
    ",",
    "\n",
    "你",
    "好",
    "世",
    "é",
    "e\u0301",
    "👩\u200d🚀",
    "🇨🇳",
    "😀",
    "नि",
    "\ufffd",
]
TEXT = st.lists(
    st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=40
).map("".join)
# without the character that stands for half of another one
WHOLE = st.lists(
    st.one_of(
        st.sampled_from(PIECES[:-1]), st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
    ),
    min_size=1,
    max_size=40,
).map("".join)
LETTERS = st.text("abc é😀", max_size=30)
STOPS = st.lists(st.text("abc é😀", min_size=1, max_size=5), min_size=1, max_size=4)


@cache
def pool(family: str) -> TokenizerPool:
    with TemporaryDirectory() as directory:
        tokenizer = getattr(tiny_tokenizers, family)()
        return TokenizerPool(tiny_tokenizers.save(tokenizer, Path(directory)), threads=1)


def ids_of(tokenizer: TokenizerPool, text: str) -> list[int]:
    return tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


def run(
    tokenizer: TokenizerPool,
    ids: Sequence[int],
    prompt: Sequence[int] = (),
    stop: Sequence[str] = (),
    **options: bool,
) -> list[TextDelta]:
    detokenizer = IncrementalDetokenizer(
        tokenizer, prompt, stop=StopStrings(stop) if stop else None, **options
    )
    deltas = []
    for number, token_id in enumerate(ids, 1):
        deltas.append(detokenizer.push(token_id, last=number == len(ids)))
        if deltas[-1].stop_hit is not None:
            break
    return deltas


def joined(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_joined_pieces_are_the_full_decode(family: str, text: str) -> None:
    # the decoder of byte tokens spoils whole runs of them, so there a real U+FFFD is like a broken character
    assume(family == "byte_level" or "\ufffd" not in text)
    ids = ids_of(pool(family), text)
    deltas = run(pool(family), ids)
    assert joined(deltas) == pool(family).decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in delta.text for delta in deltas)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=100)
@given(prompt=WHOLE, text=WHOLE)
def test_after_a_prompt_the_text_continues_it(family: str, prompt: str, text: str) -> None:
    tokenizer = pool(family)
    ids = ids_of(tokenizer, prompt + text)
    # in the middle, or where the character there ends
    befores = ((cut, tokenizer.decode(ids[:cut])) for cut in range(len(ids) // 2, len(ids) + 1))
    cut, before = next((cut, text) for cut, text in befores if text and "\ufffd" not in text)
    assert before + joined(run(tokenizer, ids[cut:], ids[:cut])) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 329), max_size=60))
def test_random_byte_level_ids_join_to_the_full_decode(ids: list[int]) -> None:
    assert joined(run(pool("byte_level"), ids)) == pool("byte_level").decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_word_keeps_its_space_after_a_prompt(family: str) -> None:
    tokenizer = pool(family)
    ids, prompt = ids_of(tokenizer, "hello world"), ids_of(tokenizer, "hello")
    assert ids[: len(prompt)] == prompt
    assert joined(run(tokenizer, ids[len(prompt) :], prompt)) == " world"
    assert joined(run(tokenizer, ids)) == "hello world"
    alone = joined(run(tokenizer, ids[len(prompt) :]))
    assert alone == ("world" if family == "sentencepiece" else " world")


def test_half_a_character_waits_and_comes_out_at_the_end() -> None:
    tokenizer = pool("byte_level")
    ids = ids_of(tokenizer, "a😀")
    assert len(ids) == 5
    texts = [delta.text for delta in run(tokenizer, ids)]
    assert texts == ["a", "", "", "", "😀"]
    cut = [delta.text for delta in run(tokenizer, ids[:-1])]
    assert cut == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_that_never_make_a_character_neither_stall_nor_grow_the_window(family: str) -> None:
    tokenizer = pool(family)
    broken = ids_of(tokenizer, "😀")[-1]  # a continuation byte
    detokenizer = IncrementalDetokenizer(tokenizer, ())
    texts = [detokenizer.push(broken).text for _ in range(500)]
    assert len("".join(texts)) >= 490
    assert len(detokenizer._text._ids) < 40
    for token_id in ids_of(tokenizer, "x😀"):
        texts.append(detokenizer.push(token_id).text)
    assert "".join(texts).endswith("x😀")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_stays_short_over_a_long_text(family: str) -> None:
    tokenizer = pool(family)
    rng = random.Random(1)
    ids = ids_of(tokenizer, "".join(rng.choice("hello 你好😀 world") for _ in range(3000)))
    detokenizer = IncrementalDetokenizer(tokenizer, ())
    longest = 0
    for token_id in ids:
        detokenizer.push(token_id)
        longest = max(longest, len(detokenizer._text._ids))
    assert longest <= 24


@pytest.mark.parametrize("skip", [True, False])
def test_special_and_unknown_tokens(skip: bool) -> None:
    tokenizer = pool("byte_level")
    end = tokenizer._tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    ids = [*ids_of(tokenizer, "hi"), end, 99_999, *ids_of(tokenizer, " you")]
    text = joined(run(tokenizer, ids, skip_special_tokens=skip))
    assert text == ("hi you" if skip else "hi<|im_end|> you")


def first_match(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Start and string of the match that completes first; of two that complete together the longer."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return end - len(max(ending, key=len)), max(ending, key=len)
    return None


@pytest.mark.parametrize("include", [False, True])
@settings(deadline=None, max_examples=300)
@given(text=LETTERS, stop=STOPS)
def test_the_text_ends_at_the_first_stop_string(include: bool, text: str, stop: list[str]) -> None:
    tokenizer = pool("byte_level")
    deltas = run(tokenizer, ids_of(tokenizer, text), stop=stop, include_stop=include)
    match = first_match(text, stop)
    if match is None:
        assert joined(deltas) == text
        assert all(delta.stop_hit is None for delta in deltas)
    else:
        start, string = match
        assert joined(deltas) == text[: start + len(string) * include]
        assert deltas[-1].stop_hit == string


@settings(deadline=None, max_examples=200)
@given(text=LETTERS, stop=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    tokenizer = pool("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer, (), stop=StopStrings(stop))
    sent = seen = ""
    ids = ids_of(tokenizer, text)
    for number, token_id in enumerate(ids, 1):
        delta = detokenizer.push(token_id)
        sent += delta.text
        if delta.stop_hit is not None:
            return
        seen = tokenizer.decode(ids[:number]).removesuffix("\ufffd")
        begun = max(
            (size for string in stop for size in range(1, len(string)) if seen.endswith(string[:size])),
            default=0,
        )
        assert sent == seen[: len(seen) - begun]


def test_held_text_comes_out_when_the_answer_ends_without_a_token() -> None:
    tokenizer = pool("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer, (), stop=StopStrings(["\nUser:"]))
    texts = [detokenizer.push(token_id).text for token_id in ids_of(tokenizer, "a\nUs")]
    assert "".join(texts) == "a"
    assert detokenizer.finish() == TextDelta("\nUs", None)


def test_a_stop_string_completed_by_the_last_token_is_a_stop() -> None:
    tokenizer = pool("byte_level")
    deltas = run(tokenizer, ids_of(tokenizer, "one END"), stop=["END"])
    assert joined(deltas) == "one " and deltas[-1].stop_hit == "END"


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(
        st.sampled_from(["hello", " world", "你", "<|im_start|>", "<|im_end|>", "</s>"]), max_size=12
    )
)
def test_a_kept_special_token_is_written_out_and_no_other(family: str, pieces: list[str]) -> None:
    tokenizer = pool(family)
    special = tokenizer.special_by_text
    ids = [
        i for piece in pieces for i in ([special[piece]] if piece in special else ids_of(tokenizer, piece))
    ]
    kept = tokenizer.ids_of_special(["<|im_start|>", "hello"])
    prompt = [special["<|im_end|>"], special["<|im_start|>"]]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, kept=kept)
    text = "".join(detokenizer.push(i).text for i in ids) + detokenizer.finish().text
    shown = [piece for piece in pieces if piece not in special or piece == "<|im_start|>"]
    assert text.replace(" ", "") == "".join(shown).replace(" ", "")
