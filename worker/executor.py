"""Rank 0's side of a step: forward on this device, then sample. Further ranks will join here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.plan import StepPlan
from worker.runner import ModelRunner
from worker.sampler import Sampler


@dataclass(slots=True)
class RunTimes:
    """Seconds over all steps; the parts of StepTimes.run."""

    forward: float = 0.0
    sample: float = 0.0


@dataclass(slots=True)
class LeaderExecutor:
    runner: ModelRunner
    sampler: Sampler
    times: RunTimes = field(default_factory=RunTimes)

    def run(self, plan: StepPlan) -> NDArray[np.int32]:
        start = time.perf_counter()
        logits = self.runner.forward(plan)
        computed = time.perf_counter()
        tokens = self.sampler.sample(logits, plan.sequences)
        self.times.forward += computed - start
        self.times.sample += time.perf_counter() - computed
        return tokens
