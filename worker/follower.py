"""A further rank of an instance: it computes what the leader says, step by step, and samples nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NoReturn

from engine.core import Watched, step_limit_s
from engine.plan import StepPlan
from engine.step_channel import StepReceiver
from engine.step_records import InstallAdapter, RemoveAdapter, decode
from worker.prompt_logprobs import PromptHeads
from worker.runner import ModelRunner

log = logging.getLogger("llm.follower")

_WAKES = 4  # how often an idle rank shows that it lives, within its time limit


@dataclass(slots=True)
class Follower:
    """A failure is not caught: the ranks are out of step then, and are all begun anew."""

    runner: ModelRunner
    records: StepReceiver
    watched: Watched

    def run(self) -> NoReturn:
        while True:
            self.step()

    def step(self) -> None:
        """Carry out the next record, or wait for one."""
        limit_s = self.watched.step_timeout_s
        self.watched.pulse.expect_within(limit_s)
        data = self.records.take(limit_s / _WAKES)
        if data is None:
            return
        match decode(data):
            case StepPlan() as plan:
                self.watched.pulse.expect_within(step_limit_s(limit_s, plan))
                self.runner.swap(plan)
                self.runner.forward(plan, PromptHeads.of(plan))
            case InstallAdapter(name, path):
                fault = self.runner.adapters.install(name, path)
                if fault:
                    log.error("adapter %s: %s", name, fault)
                self.runner.group.least(not fault)
            case RemoveAdapter(name):
                self.runner.adapters.remove(name)
