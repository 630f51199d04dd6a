"""Speculative decoding: guesses of what a sequence says next, which the model then checks in one step.

A guess is what followed the last place where the sequence read as it does now (prompt lookup; Saxena 2023,
and the n-gram pool of lookahead decoding, Fu et al. 2024, without its extra rows). Where nothing has been
said before nothing is guessed, and what keeps being wrong is guessed less and less often.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]

_SHORTEST_MATCH = 2  # tokens: a single one stands everywhere
_LONGEST_MATCH = 8  # longer ones do not guess better
_FIRST_GUESS = 4
_LONGEST_PAUSE = 64  # steps between two tries of a sequence whose guesses are wrong


def look_up(tokens: TokenArray, count: int) -> TokenArray:
    """What is likely to follow `tokens` [n]: `count` of them, or none without a place to copy from.

    Of the earlier places whose last tokens match the present ones, at least two, the one with the longest
    match counts (up to eight tokens), and of several the latest. A copy that reaches the present goes on with
    what it has copied: text that repeats itself is expected to do so for ever.
    """
    end = len(tokens) - 1
    ends = np.flatnonzero(tokens[:end] == tokens[end])  # where the newest token stood before
    length = 1
    while length < _LONGEST_MATCH:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[end - length]]
        if not len(longer):
            break
        ends = longer
        length += 1
    if length < _SHORTEST_MATCH:
        return tokens[:0]
    source = tokens[ends[-1] + 1 :]
    return source[:count] if len(source) >= count else np.resize(source, count)


class GuessLength:
    """How much a sequence guesses in its next step: more after guesses that were right, less after others."""

    __slots__ = ("_length", "_longest", "_misses", "_pause")

    def __init__(self, longest: int) -> None:
        """`longest`: tokens guessed in one step, at most."""
        self._longest = longest
        self._length = min(_FIRST_GUESS, longest)
        self._misses = 0  # in a row
        self._pause = 0  # steps still to pass without a guess

    def next(self) -> int:
        """Tokens to guess in this step; called once for each."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    def tell(self, guessed: int, right: int) -> None:
        """Of the `guessed` (> 0) tokens of this step, the first `right` were what the model says."""
        if right == guessed:
            self._length = min(2 * self._length, self._longest)
        else:
            self._length = max(1, min(right + 1, self._longest))
        if right:
            self._misses = 0
            return
        self._misses += 1
        self._pause = min(2**self._misses, _LONGEST_PAUSE)
