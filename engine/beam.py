"""Beam search over one group: which continuations live on, which answers are complete, when to stop.

Scores and stopping are those of transformers' defaults (length penalty 1, early_stopping False): a complete
answer counts its cumulative log-probability divided by its length, and the search ends when the best living
beam could no longer beat the worst of `width` complete answers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.block_manager import BlockManager
from engine.sequence import Sequence

Top = list[tuple[int, float]]


class History(NamedTuple):
    """What is told about one token of a beam."""

    token: int
    logprob: float
    top: Top


class Candidate(NamedTuple):
    score: float  # cumulative log-probability
    parent: Sequence
    step: History


class Answer(NamedTuple):
    score: float  # cumulative log-probability per token
    steps: list[History]


@dataclass(slots=True)
class BeamSearch:
    """The state of one group's search; `histories` belongs to the living sequences, by branch."""

    width: int
    max_tokens: int
    ends: Collection[int]  # token ids that complete an answer
    answers: list[Answer] = field(default_factory=list)  # at most `width`, best first
    histories: dict[int, list[History]] = field(default_factory=dict)
    done: bool = False

    def advance(self, sequences: list[Sequence], candidates: list[Candidate], blocks: BlockManager) -> None:
        """Continue `sequences` (all of the group's) with the best candidates, or end the search.

        `candidates`: of every living beam the (1 + number of ends) * width most likely tokens.
        """
        length = candidates[0].parent.num_output + 1
        kept = sorted(candidates, key=lambda candidate: -candidate.score)[: (1 + len(self.ends)) * self.width]
        complete = [c.step.token in self.ends or length >= self.max_tokens for c in kept]
        # only what is among the best may end; the rest is a reserve of living beams
        for candidate, ends_here in zip(kept[: self.width], complete, strict=False):
            if ends_here:
                steps = [*self.histories.get(candidate.parent.branch, ()), candidate.step]
                self.answers.append(Answer(candidate.score / length, steps))
        self.answers.sort(key=lambda answer: -answer.score)
        del self.answers[self.width :]

        living = [c for c, ends_here in zip(kept, complete, strict=True) if not ends_here][: self.width]
        full = len(self.answers) == self.width
        self.done = not living or (full and living[0].score / length <= self.answers[-1].score)
        if not self.done:
            self._continue(sequences, living, blocks)

    def _continue(self, sequences: list[Sequence], living: list[Candidate], blocks: BlockManager) -> None:
        """Turn the sequences into the living candidates, sharing every block they have in common."""
        parents = {candidate.parent.branch for candidate in living}
        spare = [seq for seq in sequences if seq.branch not in parents]
        for seq in spare:
            blocks.release(seq)
            seq.ended = True  # until a candidate needs it: a small vocabulary may leave fewer than `width`
        taken: set[int] = set()
        targets = []
        for candidate in living:
            parent = candidate.parent
            if parent.branch in taken:
                target = spare.pop()
                target.ended = False
                _fork(parent, target, blocks)
            else:
                taken.add(parent.branch)
                target = parent
            targets.append((target, self.histories.get(parent.branch, [])))
        # only now: a parent must not have grown while others are forked from it
        histories = {}
        for (target, history), candidate in zip(targets, living, strict=True):
            target.append(candidate.step.token)
            target.cumulative_logprob = candidate.score
            histories[target.branch] = [*history, candidate.step]
        self.histories = histories


def _fork(source: Sequence, target: Sequence, blocks: BlockManager) -> None:
    blocks.share(source, target)
    target.tokens[: source.num_tokens] = source.tokens[: source.num_tokens]
    target.num_tokens = target.num_known = source.num_tokens
    target.block_digests = source.block_digests.copy()
    target.num_computed = source.num_computed
