"""The seam between the step loop and whatever computes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step produced, per sample of the plan.

    Log-probabilities are natural logs of the model's own distribution, and only there when a sample asks for
    them (`SamplingParams.logprobs` >= 0, or a beam); rows that do not ask hold nothing meaningful.
    """

    tokens: NDArray[np.int32]  # [S], -1: the row's logits were no numbers
    logprobs: NDArray[np.float32] | None = None  # [S] of the chosen token
    top_ids: NDArray[np.int32] | None = None  # [S, K] the most likely tokens, best first
    top_logprobs: NDArray[np.float32] | None = None  # [S, K]


class Executor(Protocol):
    def run(self, plan: StepPlan) -> Sampled:
        """Compute the step on every rank and sample."""
