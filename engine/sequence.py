"""One sequence of tokens on its way through the engine, and the states it can be in."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineBug
from engine.sampling_params import SamplingParams

TokenArray = NDArray[np.int32]


class SeqStatus(Enum):
    WAITING = "waiting"  # prompt (and, after preemption, its output so far) still to be prefilled
    RUNNING = "running"
    FINISHED = "finished"


_NEXT: dict[SeqStatus, set[SeqStatus]] = {
    SeqStatus.WAITING: {SeqStatus.RUNNING, SeqStatus.FINISHED},
    SeqStatus.RUNNING: {SeqStatus.WAITING, SeqStatus.FINISHED},  # -> WAITING is preemption
    SeqStatus.FINISHED: set(),
}


class Sequence:
    """Tokens, block table and status of one sequence.

    `tokens[:num_tokens]` is the prompt followed by the output so far. The first `num_computed` of them
    have keys and values in the cache; a running sequence always lacks exactly its newest token there.
    """

    __slots__ = (
        "_status", "arrival", "block_table", "enqueued", "num_computed", "num_prompt", "num_tokens",
        "params", "priority", "rank", "request_id", "stop_token_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int,
        prompt: TokenArray,
        params: SamplingParams,
        *,
        priority: int = 5,
        now: float = 0.0,
    ) -> None:
        """`prompt`: int32 [n], n >= 1. `priority`: 1 (first) .. 5. `now`: monotonic seconds."""
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.num_prompt = len(prompt)
        self.num_tokens = len(prompt)
        # one allocation for the whole life: appending never copies
        self.tokens: TokenArray = np.empty(len(prompt) + params.max_tokens, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.num_computed = 0
        self.block_table: list[int] = []
        self.arrival = now
        self.enqueued = now  # when the sequence last began to wait for a step
        self.rank = now  # place in the queues, smallest first; the scheduler sets it
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self._status = SeqStatus.WAITING

    @property
    def status(self) -> SeqStatus:
        return self._status

    def move(self, to: SeqStatus) -> None:
        if to not in _NEXT[self._status]:
            raise EngineBug(f"sequence {self.request_id}: {self._status.name} -> {to.name}")
        self._status = to

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def prompt_ids(self) -> TokenArray:
        return self.tokens[: self.num_prompt]

    @property
    def output_ids(self) -> TokenArray:
        return self.tokens[self.num_prompt : self.num_tokens]

    def append(self, token: int) -> None:
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1

    def __repr__(self) -> str:  # never the tokens: they are the user's text
        return f"Sequence({self.request_id}, {self._status.name}, {self.num_prompt}+{self.num_output} tokens)"
