"""Guesses of what comes next, and how many of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.speculation import GuessLength, TokenArray, look_up


def ids(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def test_what_followed_the_same_words_follows_again() -> None:
    assert look_up(ids(1, 2, 3, 4, 5, 9, 2, 3), 2).tolist() == [4, 5]


def test_a_copy_that_reaches_the_present_goes_on_with_itself() -> None:
    assert look_up(ids(1, 2, 3, 4, 5, 9, 2, 3), 8).tolist() == [4, 5, 9, 2, 3, 4, 5, 9]
    assert look_up(ids(7, 7, 7), 4).tolist() == [7, 7, 7, 7]


def test_the_longest_match_counts_and_of_several_the_latest() -> None:
    assert look_up(ids(1, 2, 3, 50, 0, 2, 3, 60, 1, 2, 3), 1).tolist() == [50]
    assert look_up(ids(2, 3, 50, 0, 2, 3, 60, 1, 2, 3), 1).tolist() == [60]


def test_nothing_is_guessed_from_a_single_token_or_from_nothing() -> None:
    assert not len(look_up(ids(1, 2, 3, 9, 3), 4))
    assert not len(look_up(ids(5), 4))
    assert not len(look_up(ids(1, 2, 3), 4))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 16))
def test_a_guess_is_what_stands_behind_the_best_match(text: list[int], count: int) -> None:
    def match(end: int) -> int:
        length = 0
        while length < 8 and length <= end and text[end - length] == text[len(text) - 1 - length]:
            length += 1
        return length

    lengths = [match(end) for end in range(len(text) - 1)]
    best = max(lengths, default=0)
    guess = look_up(np.array(text, np.int32), count).tolist()
    if best < 2:
        assert guess == []
    else:
        end = max(index for index, length in enumerate(lengths) if length == best)
        source = text[end + 1 :]
        assert guess == [source[index % len(source)] for index in range(count)]


def test_guesses_that_are_right_get_longer_up_to_the_limit() -> None:
    length = GuessLength(10)
    seen = []
    for _ in range(5):
        seen.append(length.next())
        length.tell(seen[-1], seen[-1])
    assert seen == [4, 8, 10, 10, 10]


def test_guesses_that_are_wrong_become_short_and_rare() -> None:
    length = GuessLength(16)
    guessed = []
    for _ in range(1000):
        guessed.append(length.next())
        if guessed[-1]:
            length.tell(guessed[-1], 0)
    assert sum(guessed) < 30
    assert set(guessed) == {0, 1, 4}


@given(st.integers(1, 16), st.lists(st.floats(0, 1), max_size=80))
def test_a_guess_never_exceeds_its_limit_and_one_that_was_right_is_followed_by_another(
    longest: int, shares: list[float]
) -> None:
    length = GuessLength(longest)
    for share in shares:
        guessed = length.next()
        assert 0 <= guessed <= longest
        if guessed:
            right = int(share * guessed)
            length.tell(guessed, right)
            if right:
                assert 1 <= length.next() <= longest
