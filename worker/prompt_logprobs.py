"""How likely the model thought the tokens of a prompt, for the requests that ask; the others cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executor import PromptScores
from engine.plan import StepKind, StepPlan
from worker.batch import Batch

# Logits of a whole prompt would take gigabytes. Fewer than any platform's `wide_rows`, so that they are
# computed like those of a decode step.
_POSITIONS_AT_ONCE = 64


Logits = Callable[[Tensor], Tensor]  # [n, hidden] -> [n, vocab]


class PromptScorer(Protocol):
    def add(self, piece: StepPlan, batch: Batch, hidden: Tensor, logits: Logits) -> None:
        """hidden: [T, hidden], one row per query token of `batch`, which is made of `piece`."""


class PromptLogprobs:
    """Gathers the scores of one step, piece by piece as its hidden states come."""

    def __init__(self) -> None:
        self.scores: dict[int, PromptScores] = {}  # by request

    @staticmethod
    def of(plan: StepPlan) -> PromptLogprobs | None:
        """None when the step owes nobody any."""
        if plan.kind is StepKind.DECODE or not any(map(plan.owed_scores, range(plan.num_rows))):
            return None
        return PromptLogprobs()

    def add(self, piece: StepPlan, batch: Batch, hidden: Tensor, logits: Logits) -> None:
        """hidden: [T, hidden], one row per query token of `batch`, which is made of `piece`."""
        for row, states in _owed_states(piece, batch, hidden):
            seq, owed = piece.sequences[row], piece.owed_scores(row)
            actual = torch.from_numpy(seq.tokens[owed.start : owed.stop]).long().to(hidden.device)
            pieces = [
                _score(logits(own), tokens, seq.params.prompt_logprobs)
                for own, tokens in zip(
                    torch.split(states, _POSITIONS_AT_ONCE),
                    torch.split(actual, _POSITIONS_AT_ONCE),
                    strict=True,
                )
            ]
            self.scores[seq.request_id] = PromptScores(*map(np.concatenate, zip(*pieces, strict=True)))


class PromptHeads:
    """For a rank that does not sample: its part of the same logits, which the leader's are joined from."""

    @staticmethod
    def of(plan: StepPlan) -> PromptHeads | None:
        return None if PromptLogprobs.of(plan) is None else PromptHeads()

    def add(self, piece: StepPlan, batch: Batch, hidden: Tensor, logits: Logits) -> None:
        for _, states in _owed_states(piece, batch, hidden):
            for own in torch.split(states, _POSITIONS_AT_ONCE):
                logits(own)


def _owed_states(piece: StepPlan, batch: Batch, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows of `piece` that owe scores, each with the hidden states these are made of, [n, hidden]."""
    for row in range(piece.num_rows):
        owed = piece.owed_scores(row)
        if not owed:
            continue
        place = row if batch.order is None else int(np.flatnonzero(batch.order == row)[0])
        first = int(batch.context_len[place] - np.diff(batch.query_start)[place])  # position in its text
        start = int(batch.query_start[place]) + owed.start - 1 - first
        yield row, hidden[start : start + len(owed)]


def _score(logits: Tensor, actual: Tensor, num_others: int) -> tuple[NDArray[Any], ...]:
    """logits: [n, vocab]; actual: [n] -> the members of PromptScores."""
    values = logits.float()
    normaliser = values.logsumexp(dim=-1, keepdim=True)
    own = values.gather(1, actual[:, None])
    ranks = (values > own).sum(dim=-1) + 1
    top, ids = values.topk(min(num_others + 1, values.shape[1]), dim=-1)
    # the others are these without the actual token, or without the last where it is not among them
    left = ids != actual[:, None]
    left[left.all(dim=-1), -1] = False
    shape = (len(actual), left.shape[1] - 1)
    return (
        actual.to("cpu", torch.int32).numpy(),
        (own - normaliser)[:, 0].cpu().numpy(),
        ranks.to("cpu", torch.int32).numpy(),
        ids[left].view(shape).to("cpu", torch.int32).numpy(),
        (top - normaliser)[left].view(shape).cpu().numpy(),
    )
