"""Decides what runs next: prefill or decode, which requests, who gives way when blocks run out."""

from __future__ import annotations

import logging
import math
from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from engine.block_manager import BlockManager
from engine.draft import Draft
from engine.executor import Sampled
from engine.group_blocks import allocate, needs
from engine.logs.codes import FIRST_TOKEN_LATE, code
from engine.outcome import Outcome
from engine.plan import StepKind, StepPlan
from engine.requests import Requests, Turn, rank_of
from engine.results import StepResults
from engine.sequence import GroupStatus, Sequence, SequenceGroup
from engine.settings import ScheduleSettings
from engine.speculation import Speculation
from engine.swap_space import SwapSpace

log = logging.getLogger("llm.scheduler")

# Decode goes first below this share of free blocks: a prefill would only be preempted again.
_LOW_BLOCKS = 0.05


class Scheduler(Requests):
    """Continuous batching over a paged cache; one call of `schedule` and one of `commit` per step.

    All times are monotonic seconds given by the caller.
    """

    def __init__(
        self,
        limits: ScheduleSettings,
        blocks: BlockManager,
        eos_token_ids: Seq[int],
        swap: SwapSpace | None = None,
    ) -> None:
        super().__init__(limits, blocks, eos_token_ids, swap)
        self.num_prefix_tokens = 0  # of prompts, looked up in the prefix cache
        self.num_prefix_hits = 0  # of them, found there
        self.speculation = Speculation(limits, blocks) if limits.guess_length else None
        self.results = StepResults(self, self.speculation)

    # -- one step -----------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Choose the next step and allocate its blocks; None when nothing can or should run now."""
        self.turn = Turn(now)
        if self._prefill_due(now):
            groups = self._probe_batch()
            if not groups and not self._blocks_low():
                groups = self._prefill_batch()
            if groups:
                return self._plan(StepKind.PREFILL, groups)
            self._protect_first_token(now)
        groups = self._decode_batch()
        if groups:
            guesses = None
            if self.speculation is not None and not self._blocks_low():
                guesses = self.speculation.guess(groups)
            return self._plan(StepKind.DECODE, groups, guesses)
        return None

    def commit(self, plan: StepPlan, sampled: Sampled, now: float) -> list[Outcome]:
        """Apply what was sampled for `plan.samples` and end what is done."""
        return self.results.commit(self.turn, plan, sampled, now)

    def note_pace(self, turn: Turn, plan: StepPlan, seconds: float) -> None:
        """How long a step has taken, for who sizes the next ones by it."""

    def seconds_until_due(self, now: float) -> float | None:
        """How long the caller may sleep before `schedule` could do more; None where it has nothing to do."""
        if self.swapped:
            return 0.0
        if not self.waiting:
            return None
        if self.waiting[0].is_probe:
            return 0.0
        return max(0.0, self.waiting[0].arrival + self.limits.max_queue_delay_us / 1e6 - now)

    def _plan(
        self,
        kind: StepKind,
        groups: list[SequenceGroup],
        guesses: Mapping[Sequence, int] | None = None,
    ) -> StepPlan:
        self.turn.groups = groups
        draft = Draft()
        for group in groups:
            if group.has_output or kind is StepKind.DECODE:  # without output, it was held back
                draft.continue_all(group, guesses)
            else:
                draft.begin(group)
        return draft.plan(kind, self.blocks, self.swap)

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

    def _head_is_protected(self) -> bool:
        return bool(self.waiting) and self.waiting[0].rank == -math.inf

    def _comes_later(self, group: SequenceGroup) -> bool:
        """Whether a waiting group begins only when those are back that have been swapped out."""
        return bool(self.swapped) and group.rank != -math.inf

    def _probe_batch(self) -> list[SequenceGroup]:
        """A probe at the head of `waiting`, in a step of its own: the batch may be full, and stays as it is.

        Its one token ends it, so it needs a block for this step only.
        """
        head = self.waiting[0]
        if not head.is_probe or needs(self.blocks, head).blocks > self.blocks.num_free:
            return []
        self._allocate(head)
        return self._start([head])

    def _prefill_batch(self) -> list[SequenceGroup]:
        """Move groups from the head of `waiting` to `running` while budgets last; nobody overtakes."""
        limits = self.limits
        room = min(limits.max_prefill_batch_size, limits.max_batch_size - self._num_running())
        batch: list[SequenceGroup] = []
        width = tokens = 0
        for group in self.waiting:
            width += len(group.live)
            if width > room or self._comes_later(group):
                break
            needed_blocks, needed_tokens = needs(self.blocks, group)
            # alone, a request may exceed the budget: recomputed, it holds its output besides the prompt
            if batch and tokens + needed_tokens > min(
                limits.max_prefill_tokens, limits.enough_prefill_tokens
            ):
                break
            # Resuming into the very last block means being preempted by the next decode step.
            takes_all = needed_blocks == self.blocks.num_free
            if group.has_output and takes_all and (self.running or batch):
                break
            if needed_blocks > self.blocks.num_free:
                break
            self._allocate(group)
            tokens += needed_tokens
            batch.append(group)
        return self._start(batch)

    def _allocate(self, group: SequenceGroup) -> None:
        allocate(self.blocks, group)
        if self.blocks.has_prefix_cache and not group.has_output and not group.num_preemptions:
            self.num_prefix_tokens += group.sequences[0].num_prompt
            self.num_prefix_hits += group.num_cached

    def _start(self, batch: list[SequenceGroup]) -> list[SequenceGroup]:
        """Move the batch, which has its blocks, from `waiting` to `running`."""
        for group in batch:
            self.waiting.remove(group)
            group.move(GroupStatus.RUNNING)
            insort(self.running, group, key=rank_of)
        return batch

    def _num_running(self) -> int:
        return sum(len(group.live) for group in self.running)

    def overdue_first_token(self, now: float) -> SequenceGroup | None:
        """The newcomer that is next, when it lacks blocks and has waited too long for its first token."""
        head = next((group for group in self.waiting if not group.is_probe), None)
        if head is None or len(self.running) < 2 or head.has_output:
            return None
        waited_ms = (now - head.arrival) * 1e3
        if waited_ms <= self.limits.max_first_token_wait_ms:
            return None
        return head if needs(self.blocks, head).blocks > self.blocks.num_free else None

    def _protect_first_token(self, now: float) -> None:
        """Free one running group's blocks for a newcomer that has waited too long for its first token."""
        head = self.overdue_first_token(now)
        if head is None:
            return
        # it stays at the head until it runs: a victim before it would just take the blocks back
        head.rank = -math.inf
        victim = self._give_way(may_swap=False)  # it would come back before the newcomer
        log.warning(
            "request %d waited %.0f ms for its first token: preempted request %d for it",
            head.request_id, (now - head.arrival) * 1e3, victim.request_id, extra=code(FIRST_TOKEN_LATE),
        )  # fmt: skip

    # -- decode -------------------------------------------------------------------------------------

    def _decode_batch(self) -> list[SequenceGroup]:
        """The running groups in their order, each branch with a slot for its newest token.

        When blocks run out another group gives way; the last resort is to give way oneself. When nobody had
        to, who has been swapped out comes back.
        """
        batch: list[SequenceGroup] = []
        width = 0
        decoding = [group for group in self.running if not group.prefilling and group not in self.closing]
        for group in decoding:
            if group.status is not GroupStatus.RUNNING:
                continue  # it has given way to one before it
            if batch and width + len(group.live) > self.limits.max_batch_size:
                break
            while not all(self.blocks.grow(seq) for seq in group.live):
                victim = self._give_way()
                if victim is group:
                    break
                if victim in batch:
                    batch.remove(victim)
                    width -= len(victim.live)
            else:
                batch.append(group)
                width += len(group.live)
        return batch if self.turn.num_preemptions else batch + self._swap_in()

    def _swap_in(self) -> list[SequenceGroup]:
        """Bring swapped groups back in their order while there is room; each has its slots then."""
        back: list[SequenceGroup] = []
        while self.swapped and not self._head_is_protected():
            group = self.swapped[0]
            needed, free = self.swap.needs(group, self.blocks), self.blocks.num_free
            fits = needed < free or (needed == free and not self.running)
            if not fits or self._num_running() + len(group.live) > self.limits.max_batch_size:
                break
            del self.swapped[0]
            self.swap.fetch(group, self.blocks)
            for seq in group.live:
                grown = self.blocks.grow(seq)
                assert grown, group
            group.move(GroupStatus.RUNNING)
            insort(self.running, group, key=rank_of)
            back.append(group)
        return back
