"""templateType Mix (SplitFuse): every step decodes, and has room for pieces of prompts beside that."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from engine.block_manager import BlockManager
from engine.draft import Draft
from engine.executor import Sampled
from engine.group_blocks import needs
from engine.outcome import Outcome
from engine.pacing import ChunkPacer
from engine.plan import StepKind, StepPlan
from engine.requests import Turn
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceGroup
from engine.settings import MixSettings, ScheduleSettings
from engine.swap_space import SwapSpace


def make_scheduler(
    limits: ScheduleSettings, blocks: BlockManager, eos_token_ids: Seq[int], swap: SwapSpace | None = None
) -> Scheduler:
    if limits.mix is None:
        return Scheduler(limits, blocks, eos_token_ids, swap)
    return MixScheduler(limits, limits.mix, blocks, eos_token_ids, swap)


class MixScheduler(Scheduler):
    """One batch per step: what decodes, then prompts that have begun, then those that wait.

    A prompt takes all of its blocks when it begins. Its last piece draws the first token. What is computed
    again after a preemption draws nothing: when all but its newest token is there, it decodes.
    """

    def __init__(
        self,
        limits: ScheduleSettings,
        mix: MixSettings,
        blocks: BlockManager,
        eos_token_ids: Seq[int],
        swap: SwapSpace | None,
    ) -> None:
        super().__init__(limits, blocks, eos_token_ids, swap)
        self._mix = mix
        self._pacer = ChunkPacer()
        self._budget = 0  # tokens of prompts that the step may still take

    def schedule(self, now: float) -> StepPlan | None:
        self.turn = turn = Turn(now)
        if self.waiting:
            self._protect_first_token(now)
        decoding = self._decode_batch()
        turn.num_decoding = sum(len(group.live) for group in decoding)
        self._budget = self.limits.max_prefill_tokens - turn.num_decoding
        if decoding and not self._mix.chunk_size:
            self._budget = min(self._budget, self._pacer.tokens(turn.num_decoding))
        draft = Draft()
        for group in decoding:
            draft.continue_all(group)
        begun = [group for group in self.running if group.prefilling]
        prefilling = [group for group in begun if self._take_chunk(group, draft)]
        prefilling += self._begin_waiting(draft, begun)
        turn.groups = decoding + prefilling
        if not turn.groups:
            return None
        kind = StepKind.MIXED if decoding else StepKind.PREFILL
        return draft.plan(kind if prefilling else StepKind.DECODE, self.blocks, self.swap)

    def commit(self, plan: StepPlan, sampled: Sampled, now: float) -> list[Outcome]:
        self.note_pace(self.turn, plan, now - self.turn.started)
        return super().commit(plan, sampled, now)

    def note_pace(self, turn: Turn, plan: StepPlan, seconds: float) -> None:
        self._pacer.note(turn.num_decoding, plan.num_tokens - turn.num_decoding, seconds)

    def seconds_until_due(self, now: float) -> float | None:
        """Nobody waits for company."""
        return 0.0 if self.waiting or self.swapped else None

    def _largest_request(self) -> tuple[int, int]:
        return self.limits.max_seq_len - 1, self.limits.max_batch_size

    # -- prompts ------------------------------------------------------------------------------------

    def _begin_waiting(self, draft: Draft, begun: list[SequenceGroup]) -> list[SequenceGroup]:
        """Let groups of `waiting` begin while there is room; only long prompts may be overtaken."""
        begun = [group for group in begun if group.prefilling]
        num_partial, num_long = len(begun), sum(map(self._is_long, begun))
        started: list[SequenceGroup] = []
        blocks_low = self._blocks_low()
        for group in list(self.waiting):
            if self._budget <= 0 or num_partial >= self._mix.max_partial:
                break
            if not group.is_probe and (blocks_low or self._comes_later(group)):
                break
            if self._is_long(group) and num_long >= self._mix.max_long_partial:
                continue
            if not self._has_place(group):
                break
            self._allocate(group)
            self._start([group])
            if self._take_chunk(group, draft):
                started.append(group)
            num_partial += group.prefilling
            num_long += group.prefilling and self._is_long(group)
        return started

    def _has_place(self, group: SequenceGroup) -> bool:
        if not group.is_probe and self._num_running() + len(group.live) > self.limits.max_batch_size:
            return False
        needed, free = needs(self.blocks, group).blocks, self.blocks.num_free
        # resuming into the very last block means being preempted by the next step
        return needed < free or (needed == free and not (group.has_output and self.running))

    def _is_long(self, group: SequenceGroup) -> bool:
        return group.sequences[0].num_prompt > self._mix.long_threshold

    def _take_chunk(self, group: SequenceGroup, draft: Draft) -> bool:
        """Put the next piece of its prefill into the step; whether there was room for any of it."""
        room = min(self._budget, self._mix.chunk_size or self._budget)
        missing = dict(_uncomputed(group))
        group.prefilling = sum(missing.values()) > room
        if not missing:  # all that was to be computed again is in the prefix cache
            if len(group.live) > self._budget and not draft.is_empty:
                return False  # it decodes with the next step
            draft.continue_all(group)
            self._budget -= len(group.live)
            return True
        if not (group.prefilling or group.has_output):
            draft.begin(group)
        else:
            left = room
            for seq, count in missing.items():
                if left > 0:
                    draft.compute(seq, seq.num_computed + min(count, left))
                left -= count
        self._budget -= min(room, sum(missing.values()))
        return room > 0


def _uncomputed(group: SequenceGroup) -> Iterator[tuple[Sequence, int]]:
    """The sequences whose prefill is not complete, and how many tokens they lack."""
    if not group.has_output:
        source = group.sequences[0]
        yield source, source.num_tokens - source.num_computed
        return
    for seq in group.live:
        if seq.num_computed < seq.num_tokens - 1:
            yield seq, seq.num_tokens - 1 - seq.num_computed
