"""Decides what runs next: prefill or decode, which sequences, who gives way when blocks run out."""

from __future__ import annotations

import logging
import math
from bisect import insort
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from engine.block_manager import BlockManager
from engine.errors import EngineFailed, GenerationRefused, ServerError
from engine.outcome import FinishCode, Outcome
from engine.plan import StepKind, StepPlan, build_plan
from engine.sequence import SeqStatus, Sequence
from engine.settings import ScheduleSettings

log = logging.getLogger("llm.scheduler")

# Decode goes first below this share of free blocks: a prefill would only be preempted again.
_LOW_BLOCKS = 0.05


class Scheduler:
    """Continuous batching over a paged cache; one call of `schedule` and one of `commit` per step.

    Both queues are kept in the order of `Sequence.rank`: `waiting` for a prefill, `running` for their next
    decode. All times are monotonic seconds given by the caller.
    """

    def __init__(self, limits: ScheduleSettings, blocks: BlockManager, eos_token_ids: Seq[int]) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._by_id: dict[int, Sequence] = {}
        self._eos = frozenset(eos_token_ids)
        self._refused: list[Outcome] = []
        self._step_started = 0.0

    # -- requests coming and going ------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Take a sequence in. One that can never be served is refused by the next `take_refused`."""
        limit = min(self.limits.max_prefill_tokens, self.limits.max_seq_len - 1)
        if seq.num_prompt > limit or not self.blocks.can_ever_hold(seq.num_prompt + 1):
            self._refuse(seq, GenerationRefused)
            return
        # First come first served, and each step of priority counts like maxFirstTokenWaitTime of waiting: so
        # nobody starves, and as everybody ages alike the order never changes and needs no sorting again.
        seq.rank = seq.arrival + seq.priority * self.limits.max_first_token_wait_ms / 1e3
        self._by_id[seq.request_id] = seq
        insort(self.waiting, seq, key=_rank)

    def abort(self, request_id: int) -> bool:
        """End a sequence in any state without a record; False when it is not (or no longer) here."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return False
        (self.waiting if seq.status is SeqStatus.WAITING else self.running).remove(seq)
        self._finish(seq)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def take_refused(self) -> list[Outcome]:
        refused, self._refused = self._refused, []
        return refused

    # -- one step -----------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Choose the next step and allocate its blocks; None when nothing can or should run now."""
        self._step_started = now
        if self._prefill_due(now):
            batch = [] if self._blocks_low() else self._prefill_batch()
            if batch:
                return build_plan(StepKind.PREFILL, batch, self.blocks.block_size)
            self._protect_first_token(now)
        batch = self._decode_batch()
        if batch:
            return build_plan(StepKind.DECODE, batch, self.blocks.block_size)
        return None

    def commit(self, plan: StepPlan, tokens: NDArray[np.int32], now: float) -> list[Outcome]:
        """Apply the sampled tokens ([R], -1 = the row's logits were no numbers) and end what is done."""
        outcomes = []
        ended = False
        for seq, token in zip(plan.sequences, tokens.tolist(), strict=True):
            wait_us = int((self._step_started - seq.enqueued) * 1e6)
            seq.enqueued = now
            seq.num_computed = seq.num_tokens
            if token < 0:
                self._finish(seq)
                outcomes.append(Outcome(seq.request_id, -1, FinishCode.ERROR, EngineFailed, wait_us))
                ended = True
                continue
            seq.append(token)
            finish = self._finish_code(seq, token)
            if finish is not FinishCode.NONE:
                self._finish(seq)
                ended = True
            outcomes.append(Outcome(seq.request_id, token, finish, None, wait_us))
        if ended:
            self.running = [seq for seq in self.running if seq.status is SeqStatus.RUNNING]
        return outcomes

    def seconds_until_due(self, now: float) -> float | None:
        """How long the caller may sleep before `schedule` could start a prefill; None without any waiting."""
        if not self.waiting:
            return None
        return max(0.0, self.waiting[0].arrival + self.limits.max_queue_delay_us / 1e6 - now)

    def check(self) -> None:
        """Prove the invariants that must hold between steps. Raises EngineBug."""
        self.blocks.check(self.running)
        for seq in self.running:
            assert seq.status is SeqStatus.RUNNING and seq.num_computed == seq.num_tokens - 1, seq
        for seq in self.waiting:
            assert seq.status is SeqStatus.WAITING and not seq.block_table and seq.num_computed == 0, seq
        assert len(self._by_id) == len(self.waiting) + len(self.running)

    # -- prefill ------------------------------------------------------------------------------------

    def _prefill_due(self, now: float) -> bool:
        if not self.waiting:
            return False
        full = len(self.waiting) >= self.limits.max_prefill_batch_size
        # a full batch gains nothing by waiting; beside running decodes that counts only for long delays
        if full and (not self.running or self.limits.max_queue_delay_us > 5000):
            return True
        return self.seconds_until_due(now) == 0.0

    def _blocks_low(self) -> bool:
        return bool(self.running) and self.blocks.num_free < _LOW_BLOCKS * self.blocks.num_blocks

    def _prefill_batch(self) -> list[Sequence]:
        """Move sequences from the head of `waiting` to `running` while budgets last; nobody overtakes."""
        limits = self.limits
        room = min(limits.max_prefill_batch_size, limits.max_batch_size - len(self.running))
        batch: list[Sequence] = []
        tokens = 0
        for seq in self.waiting:
            # alone, a sequence may exceed the budget: recomputed, it holds its output besides the prompt
            over_budget = batch and tokens + seq.num_tokens > limits.max_prefill_tokens
            if len(batch) >= room or over_budget:
                break
            # Resuming into the very last block means being preempted by the next decode step.
            takes_all = self.blocks.missing(seq, seq.num_tokens) == self.blocks.num_free
            if seq.num_output and takes_all and (self.running or batch):
                break
            if not self.blocks.grow(seq, seq.num_tokens):
                break
            tokens += seq.num_tokens
            batch.append(seq)
        del self.waiting[: len(batch)]
        for seq in batch:
            seq.move(SeqStatus.RUNNING)
            insort(self.running, seq, key=_rank)
        return batch

    def _protect_first_token(self, now: float) -> None:
        """Free one running sequence's blocks for a newcomer that has waited too long for its first token."""
        if not self.waiting or len(self.running) < 2:
            return
        head = self.waiting[0]
        waited_ms = (now - head.arrival) * 1e3
        short = self.blocks.missing(head, head.num_tokens) > self.blocks.num_free
        if head.num_output or not short or waited_ms <= self.limits.max_first_token_wait_ms:
            return
        victim = self.running.pop()
        log.warning(
            "request %d waited %.0f ms for its first token: preempting request %d for it",
            head.request_id, waited_ms, victim.request_id,
        )  # fmt: skip
        # it stays at the head until it runs: a victim before it would just take the blocks back
        head.rank = -math.inf
        self._preempt(victim)

    # -- decode -------------------------------------------------------------------------------------

    def _decode_batch(self) -> list[Sequence]:
        """The running sequences in their order, each with a slot for its newest token.

        When blocks run out the last running sequence gives way; the last resort is to give way oneself.
        """
        batch: list[Sequence] = []
        while len(batch) < min(len(self.running), self.limits.max_batch_size):
            seq = self.running[len(batch)]
            if self.blocks.grow(seq, seq.num_tokens):
                batch.append(seq)
            else:
                self._preempt(self.running.pop())
        return batch

    def _preempt(self, seq: Sequence) -> None:
        """Send a sequence (already out of `running`) back to be prefilled again with its output so far."""
        self.blocks.release(seq)
        seq.num_computed = 0
        self.num_preemptions += 1
        if not self.blocks.can_ever_hold(seq.num_tokens + 1):
            self._refuse(seq, GenerationRefused)
            return
        seq.move(SeqStatus.WAITING)
        insort(self.waiting, seq, key=_rank)
        log.info("request %d preempted after %d tokens", seq.request_id, seq.num_output)

    # -- endings ------------------------------------------------------------------------------------

    def _finish_code(self, seq: Sequence, token: int) -> FinishCode:
        params = seq.params
        if token in self._eos and not params.ignore_eos:
            return FinishCode.EOS
        if token in seq.stop_token_ids:
            return FinishCode.STOP_TOKEN
        if seq.num_output >= params.max_tokens or seq.num_tokens >= self.limits.max_seq_len:
            return FinishCode.LENGTH
        return FinishCode.NONE

    def _finish(self, seq: Sequence) -> None:
        self.blocks.release(seq)
        seq.move(SeqStatus.FINISHED)
        self._by_id.pop(seq.request_id, None)

    def _refuse(self, seq: Sequence, error: type[ServerError]) -> None:
        self._finish(seq)
        self._refused.append(Outcome(seq.request_id, -1, FinishCode.ERROR, error, 0))


def _rank(seq: Sequence) -> tuple[float, int]:
    return seq.rank, seq.request_id
