"""The seam between the step loop and whatever computes tokens."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.plan import StepPlan


class Executor(Protocol):
    def run(self, plan: StepPlan) -> NDArray[np.int32]:
        """Compute the step on every rank and sample: int32 [R], -1 where the logits were no numbers."""
