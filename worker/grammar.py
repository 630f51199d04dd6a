"""What an answer may go on with: grammars followed token by token, and the end of reasoning before them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.sequence import Sequence
from worker.masks.client import MaskClient, State, Trail

Bits = NDArray[np.bool_]

_PATIENCE_S = 0.05  # of a step with masks that are not there yet; then it goes on without their rows


class NoContinuation(Exception):
    """Nothing may follow, or finding out what may takes more than a request's share."""


class NotYet(Exception):
    """It is still being found out what may follow."""


@dataclass(slots=True)
class Progress:
    """How far one sequence has come in its reasoning and its grammar; kept with the sequence."""

    answering: bool  # the reasoning is over, or there is none
    trail: Trail | None = None  # through its grammar
    start: int = 0  # output tokens before the grammar begins
    seen: int = 0  # output tokens taken in
    ended: bool = False  # an EOS has been taken in


@dataclass(slots=True)
class GrammarBook:
    """What may come next in every sequence that has a grammar or a thinking budget."""

    masks: MaskClient
    vocab_size: int = field(init=False)
    eos: Seq[int] = field(init=False)
    _ends: Bits = field(init=False)

    def __post_init__(self) -> None:
        self.vocab_size, self.eos = self.masks.vocabulary.size, self.masks.vocabulary.eos
        self._ends = np.zeros(self.vocab_size, np.bool_)
        self._ends[[token for token in self.eos if token < self.vocab_size]] = True

    def expect(self, sequences: Iterable[Sequence]) -> None:
        """Have the masks of a step computed, beside whatever else it does before it needs them."""
        if any([self._expect(sequence) for sequence in sequences if sequence.params.grammar]):
            self.masks.push()

    def collect(self, sequences: Seq[Sequence], *, alone: bool) -> None:
        """Wait for the masks of a step, but not for long. `alone`: nobody else is in this step."""
        self.expect(sequences)
        trails = [trail for trail in map(_trail_of, sequences) if trail is not None]
        self.masks.wait((), 0.0)
        missing = [trail for trail in trails if trail.state is State.ASKED]
        if not missing:
            return
        if not (alone and len(missing) == len(sequences)):
            # for one that was too late before nobody waits any more
            missing = [trail for trail in missing if not trail.late]
        self.masks.wait(missing, _PATIENCE_S)
        for trail in missing:
            trail.late = trail.state is State.ASKED

    def legal(self, sequence: Sequence) -> Bits | int | None:
        """What may come next: a mask over the vocabulary (not to be kept), the one forced token, or anything.

        Raises NoContinuation, NotYet.
        """
        params = sequence.params
        progress = self._progress(sequence)
        if not progress.answering:
            over = sequence.num_known_output - params.thinking_budget
            if params.thinking_budget and over >= 0:
                # by position alone: it is over before these are
                return params.reasoning_end[over]
            # whoever asks for a format wants an answer after the reasoning
            return ~self._ends if params.grammar else None
        if not params.grammar:
            return None
        return self._ends if progress.ended else self._mask(progress.trail)

    def _expect(self, sequence: Sequence) -> bool:
        """Whether there is something to be sent."""
        progress = self._progress(sequence)
        if progress.trail is None:
            # reasoning or not, its grammar can be compiled meanwhile
            progress.trail = self.masks.begin(sequence.params.grammar)
        if progress.trail is None or progress.ended:
            return False
        if progress.answering:
            self.masks.ask(progress.trail, sequence.output_ids[progress.start :])
        return True

    def _progress(self, sequence: Sequence) -> Progress:
        progress = sequence.progress
        if not isinstance(progress, Progress):
            progress = sequence.progress = Progress(answering=not sequence.params.reasoning_end)
        self._take_in(progress, sequence)
        return progress

    def _take_in(self, progress: Progress, sequence: Sequence) -> None:
        output = sequence.output_ids
        end = sequence.params.reasoning_end
        while progress.seen < len(output):
            progress.seen += 1
            if not progress.answering:
                newest = output[max(0, progress.seen - len(end)) : progress.seen]
                progress.answering = newest.tolist() == list(end)
                progress.start = progress.seen
            elif int(output[progress.seen - 1]) in self.eos:
                progress.ended = True

    def _mask(self, trail: Trail | None) -> Bits:
        if trail is None or trail.state in (State.IDLE, State.ASKED):
            raise NotYet
        if trail.state is State.REFUSED:
            raise NoContinuation
        bits = np.unpackbits(self.masks.mask(trail), bitorder="little", count=self.vocab_size)
        if not bits.any():
            raise NoContinuation
        return bits.view(np.bool_)


def _trail_of(sequence: Sequence) -> Trail | None:
    progress = sequence.progress
    return progress.trail if isinstance(progress, Progress) else None
