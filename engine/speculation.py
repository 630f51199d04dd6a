"""Speculative decoding: guesses of what a sequence says next, which the model then checks in one step.

A guess is what followed the last place where the sequence read as it does now (prompt lookup; Saxena 2023,
and the n-gram pool of lookahead decoding, Fu et al. 2024, without its extra rows). Where nothing has been
said before nothing is guessed, and what keeps being wrong is guessed less and less often.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from engine.block_manager import BlockManager
from engine.plan import StepPlan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceGroup, TokenArray
from engine.settings import ScheduleSettings

# Rows of a decode step up to which guesses are added. A full step computes a row for every token anyway:
# there a guess that is right gains nothing, and one that is wrong costs.
_MOST_ROWS = 16

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


class Speculation:
    """The guesses of a scheduler's decode steps."""

    def __init__(self, limits: ScheduleSettings, blocks: BlockManager) -> None:
        self._longest = limits.guess_length
        self._max_seq_len = limits.max_seq_len
        self._blocks = blocks
        self.num_guessed = 0  # tokens, since the start
        self.num_right = 0  # of them, what the model said

    def guess(self, groups: Seq[SequenceGroup]) -> Mapping[Sequence, int]:
        """Write guesses behind the end of sequences that are to decode; how many each got, where any."""
        counts: dict[Sequence, int] = {}
        room = _MOST_ROWS - sum(len(group.live) for group in groups)
        for group in groups:
            if not _may_guess(group.params):
                continue
            for seq in group.live:
                if room <= 0:
                    return counts
                if guess := self._guess(seq, room):
                    counts[seq] = guess
                    room -= guess
        return counts

    def _guess(self, seq: Sequence, room: int) -> int:
        if seq.guess_length is None:
            seq.guess_length = GuessLength(self._longest)
        end = seq.num_tokens
        # one token comes without a guess
        left = min(seq.params.max_tokens - seq.num_output, self._max_seq_len - end) - 1
        count = min(seq.guess_length.next(), room, left)
        if count <= 0:
            return 0
        guess = look_up(seq.tokens[:end], count)
        if not len(guess) or not self._blocks.grow(seq, ahead=count):
            return 0
        seq.tokens[end : end + count] = guess
        return count

    def judge(self, plan: StepPlan, tokens: Seq[int]) -> Seq[bool]:
        """Which samples of a step with guesses count: those behind a wrong guess do not.

        `tokens`: [S] what was sampled for each row. To be called before any of it is committed.
        """
        assert plan.guessed is not None
        counts, guesses = [True] * len(tokens), plan.input_ids.tolist()
        verdicts: dict[Sequence, list[bool]] = {}
        for row in np.flatnonzero(plan.guessed).tolist():
            counts[row] = counts[row - 1] and tokens[row - 1] == guesses[row]
            verdicts.setdefault(plan.sequences[row], []).append(counts[row])
        for seq, verdict in verdicts.items():
            assert seq.guess_length is not None
            seq.guess_length.tell(len(verdict), sum(verdict))
            self.num_guessed += len(verdict)
            self.num_right += sum(verdict)
        return counts


def _may_guess(params: SamplingParams) -> bool:
    """Whether the distribution of a token depends on those before it through the model alone."""
    return not (params.beam_search or params.edits_logits)
