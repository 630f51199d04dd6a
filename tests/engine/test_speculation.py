"""Guesses of what comes next, and how many of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executor import Sampled
from engine.plan import StepPlan
from engine.sequence import TokenArray
from engine.speculation import GuessLength, look_up
from tests.engine.fake_model import LIMITS, TEXTS, Ask, FakeModel, Machine, asks, same


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


# -- in the schedule -----------------------------------------------------------------------------------


def machine(num_blocks: int = 64, guess_length: int = 8, *, prefix_cache: bool = False) -> Machine:
    return Machine(replace(LIMITS, guess_length=guess_length, prefix_cache=prefix_cache), num_blocks)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(asks(TEXTS), min_size=1, max_size=8),
    st.sampled_from((20, 26, 64)),
    st.integers(1, 16),
    st.booleans(),
)
def test_answers_are_those_without_guesses(
    requests: list[Ask], num_blocks: int, longest: int, prefix_cache: bool
) -> None:
    want = machine(640, guess_length=0).serve(replace(ask, hangs_up=0) for ask in requests)
    served = machine(num_blocks, longest, prefix_cache=prefix_cache)
    assert same(served.serve(requests), want, requests)


class Chorus(FakeModel):
    """Says what stands seven places before, again and again."""

    def run(self, plan: StepPlan) -> Sampled:
        super().run(plan)
        ends = plan.context_len.tolist()
        said = [seq.tokens[end - 7] for seq, end in zip(plan.sequences, ends, strict=True)]
        return Sampled(np.array(said, np.int32))


def chorus(guess_length: int, num_asks: int = 1, max_tokens: int = 32) -> Machine:
    served = machine(guess_length=guess_length)
    served.model = Chorus(64, LIMITS.block_size)
    refrain = (10, 11, 12, 13, 14, 15, 16)
    served.serve([Ask(refrain * 2, max_tokens=max_tokens)] * num_asks)
    assert all(told == [[*refrain * 5][:max_tokens]] for told in served.answers.values())
    return served


def test_a_text_that_repeats_itself_takes_few_steps() -> None:
    assert len(chorus(0).plans) == 32
    served = chorus(16)
    rows = [plan.num_rows for plan in served.plans[1:]]
    assert rows == [5, 9, 16, 1]  # 31 tokens after the first; a guess never reaches beyond the last
    assert served.scheduler.speculation is not None
    assert served.scheduler.speculation.num_guessed == served.scheduler.speculation.num_right == 27


def test_a_full_step_does_not_guess() -> None:
    served = chorus(16, num_asks=4)
    assert max(plan.num_rows for plan in served.plans) == 16
    assert all(plan.num_guessed == plan.num_rows - 4 for plan in served.plans[1:3])


def test_an_end_in_the_middle_of_a_guess_is_the_end() -> None:
    assert [len(chorus(16, max_tokens=count).answers[0][0]) for count in (1, 2, 3, 6, 7)] == [1, 2, 3, 6, 7]
