"""The seam between the step loop and whatever computes tokens."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.plan import StepPlan
from engine.sequence import Sequence

NO_TOKEN = -1  # the row's logits are no numbers
NO_CONTINUATION = -2  # the grammar of the answer has no legal token, or is too complex to tell
NOT_YET = -3  # nothing is wrong, but what the answer may go on with is still being found out


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What the model thought of the P tokens of a prompt after its first; natural logs, best first."""

    tokens: NDArray[np.int32]  # [P] the prompt's own
    logprobs: NDArray[np.float32]  # [P]
    ranks: NDArray[np.int32]  # [P] places among all tokens, 1 for the most likely
    other_ids: NDArray[np.int32]  # [P, K] the most likely ones without the prompt's own
    other_logprobs: NDArray[np.float32]  # [P, K]


@dataclass(frozen=True, slots=True)
class Continuations:
    """The K best next tokens of a beam with penalties or the like, best first."""

    ids: NDArray[np.int32]  # [K]
    scores: NDArray[np.float32]  # [K] what a beam gains by each
    logprobs: NDArray[np.float32]  # [K] what the model itself gives each


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step produced, per sample of the plan.

    Log-probabilities are natural logs of the model's own distribution, and only there when a sample asks for
    them (`SamplingParams.logprobs` >= 0, or a beam); rows that do not ask hold nothing meaningful.
    """

    tokens: NDArray[np.int32]  # [S], or one of the codes above
    logprobs: NDArray[np.float32] | None = None  # [S] of the chosen token
    top_ids: NDArray[np.int32] | None = None  # [S, K] the most likely tokens, best first
    top_logprobs: NDArray[np.float32] | None = None  # [S, K]
    beams: Mapping[int, Continuations] = field(default_factory=dict)  # by sample; others continue by top_*
    prompts: Mapping[int, PromptScores] = field(default_factory=dict)  # by request, with its first prefill
    failed: Seq[Sequence] = ()  # of the plan; nothing is sampled from them, and they could not be computed


class Executor(Protocol):
    def run(self, plan: StepPlan) -> Sampled:
        """Compute the step on every rank and sample."""
