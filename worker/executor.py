"""Rank 0's side of a step: tell the other ranks, forward on this device, then sample."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.executor import Sampled
from engine.plan import StepPlan
from engine.sequence import Sequence
from engine.step_channel import StepSender
from engine.step_records import encode
from worker.batch import single_rows
from worker.logprobs import with_logprobs
from worker.prompt_logprobs import PromptLogprobs
from worker.runner import ModelRunner
from worker.sampler import Sampler

log = logging.getLogger("llm.executor")


@dataclass(slots=True)
class RunTimes:
    """Seconds over all steps; the parts of StepTimes.run."""

    forward: float = 0.0
    sample: float = 0.0


@dataclass(slots=True)
class LeaderExecutor:
    runner: ModelRunner
    sampler: Sampler
    followers: StepSender | None = None  # the other ranks, if there are any
    times: RunTimes = field(default_factory=RunTimes)

    def run(self, plan: StepPlan) -> Sampled:
        start = time.perf_counter()
        if self.followers is not None:  # first: they begin while masks are asked for
            self.followers.send(encode(plan))
        self.sampler.expect(plan.samples)
        self.runner.swap(plan)
        prompts = PromptLogprobs.of(plan)
        logits, failed = self._forward(plan, prompts)
        computed = time.perf_counter()
        sampled = self._sample(plan, logits)
        if prompts is not None or failed:
            sampled = replace(sampled, prompts=prompts.scores if prompts else {}, failed=failed)
        self.times.forward += computed - start
        self.times.sample += time.perf_counter() - computed
        return sampled

    def _sample(self, plan: StepPlan, logits: Tensor) -> Sampled:
        if not plan.samples:
            return Sampled(np.empty(0, np.int32))
        if plan.sample_rows is not None:
            logits = logits[torch.from_numpy(plan.sample_rows)]
        tokens = self.sampler.sample(logits, plan.samples, plan.guessed)
        return with_logprobs(logits, plan.samples, tokens, self.runner.eos_token_ids)

    def _forward(self, plan: StepPlan, prompts: PromptLogprobs | None) -> tuple[Tensor, list[Sequence]]:
        """Logits of each row, [R, vocab]; when memory runs out, NaN in those that do not fit alone either.

        And those of them from which nothing is sampled.
        """
        logits = self._try_forward(plan, prompts)
        if logits is not None:
            return logits, []
        log.warning(
            "out of memory in a step of %d rows, %d tokens: each is tried alone",
            plan.num_rows,
            plan.num_tokens,
        )
        alone: list[Tensor] = []
        failed: list[Sequence] = []
        copies = plan.copies
        sampled = set(range(plan.num_rows) if plan.sample_rows is None else plan.sample_rows.tolist())
        for index, row in enumerate(single_rows(plan)):
            own = self._try_forward(replace(row, copies=copies), prompts)
            if own is None:
                log.error(
                    "out of memory for %d tokens of request %d", row.num_tokens, row.sequences[0].request_id
                )
                width = self.runner.vocab_size if plan.samples else 0
                own = torch.full((1, width), torch.nan, dtype=self.runner.dtype, device=self.runner.device)
                if index not in sampled:
                    failed += row.sequences
            else:
                copies = ()  # made; once more they would undo what rows have written behind them
            alone.append(own)
        return torch.cat(alone), failed

    def _try_forward(self, plan: StepPlan, prompts: PromptLogprobs | None) -> Tensor | None:
        """None when memory ran out; what it was to hold is free again by then."""
        try:
            return self.runner.forward(plan, prompts)
        except (MemoryError, RuntimeError) as error:
            # other ranks are in the middle of the same step, and cannot be asked to try again
            if self.followers is not None or not self.runner.is_out_of_memory(error):
                raise
            return None
