"""How likely the model thought the tokens of a prompt, for the requests that ask; the others cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executor import PromptScores
from engine.plan import StepKind, StepPlan

# Logits of a whole prompt would take gigabytes. Fewer than any platform's `wide_rows`, so that they are
# computed like those of a decode step.
_POSITIONS_AT_ONCE = 64


class PromptLogprobs:
    """Gathers the scores of one step, piece by piece as its hidden states come."""

    def __init__(self) -> None:
        self.scores: dict[int, PromptScores] = {}  # by request

    @staticmethod
    def of(plan: StepPlan) -> PromptLogprobs | None:
        """None when the step owes nobody any."""
        if plan.kind is StepKind.DECODE or not any(seq.owes_prompt_scores for seq in plan.sequences):
            return None
        return PromptLogprobs()

    def add(self, piece: StepPlan, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        """hidden: [T, hidden], one row per query token of `piece`; `logits` makes [n, vocab] of n of them."""
        for row, seq in enumerate(piece.sequences):
            if not seq.owes_prompt_scores:
                continue
            start, end = int(piece.query_start[row]), int(piece.query_start[row + 1])
            before = seq.num_tokens - (end - start)  # tokens of the prompt in the cache already
            # each position foretells the next token; the last one of the prompt what is sampled
            actual = torch.from_numpy(seq.tokens[before + 1 : seq.num_prompt]).long().to(hidden.device)
            states = hidden[start : start + len(actual)]
            pieces = [
                _score(logits(own), tokens, seq.params.prompt_logprobs)
                for own, tokens in zip(
                    torch.split(states, _POSITIONS_AT_ONCE),
                    torch.split(actual, _POSITIONS_AT_ONCE),
                    strict=True,
                )
            ]
            self.scores[seq.request_id] = PromptScores(*map(np.concatenate, zip(*pieces, strict=True)))


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
