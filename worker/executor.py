"""Rank 0's side of a step: forward on this device, then sample. Further ranks will join here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from engine.executor import Sampled
from engine.plan import StepPlan
from worker.logprobs import with_logprobs
from worker.prompt_logprobs import PromptLogprobs
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

    def run(self, plan: StepPlan) -> Sampled:
        start = time.perf_counter()
        self.sampler.expect(plan.samples)
        prompts = PromptLogprobs.of(plan)
        logits = self.runner.forward(plan, prompts)
        computed = time.perf_counter()
        if plan.sample_rows is not None:
            logits = logits[torch.from_numpy(plan.sample_rows)]
        tokens = self.sampler.sample(logits, plan.samples)
        sampled = with_logprobs(logits, plan.samples, tokens, self.runner.eos_token_ids)
        if prompts is not None:
            sampled = replace(sampled, prompts=prompts.scores)
        self.times.forward += computed - start
        self.times.sample += time.perf_counter() - computed
        return sampled
