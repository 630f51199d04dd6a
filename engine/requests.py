"""The requests of an instance: who waits, runs or is swapped out, and how each comes, gives way and ends."""

from __future__ import annotations

import logging
import math
from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from engine.beam import BeamSearch
from engine.block_manager import BlockManager
from engine.errors import GenerationRefused, ServerError
from engine.group_blocks import can_ever_hold, needs
from engine.logs import REQUESTS
from engine.outcome import FinishCode, Outcome
from engine.sequence import GroupStatus, Sequence, SequenceGroup
from engine.settings import ScheduleSettings
from engine.swap_space import SwapSpace

request_log = logging.getLogger(REQUESTS)


@dataclass(slots=True)
class Turn:
    """What belongs to a step besides its plan."""

    started: float = 0.0  # when its planning began
    groups: list[SequenceGroup] = field(default_factory=list)  # all that it computes something for
    num_decoding: int = 0  # rows of a step of templateType Mix that decode
    num_preemptions: int = 0
    num_swaps: int = 0


class Requests:
    """All requests that have not ended, and what they hold.

    All queues are kept in the order of `SequenceGroup.rank`: `waiting` for a prefill, `running` for their
    next decode, `swapped` for room in the cache.
    """

    def __init__(
        self,
        limits: ScheduleSettings,
        blocks: BlockManager,
        eos_token_ids: Seq[int],
        swap: SwapSpace | None = None,
    ) -> None:
        self.limits = limits
        self.swap = swap or SwapSpace(0)
        self.blocks = blocks
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self.by_id: dict[int, SequenceGroup] = {}
        self.turn = Turn()
        # those whose last token is under way: only where steps overlap, see engine/lookahead.py
        self.closing: set[SequenceGroup] = set()
        self.num_preemptions = 0
        self.eos = frozenset(eos_token_ids)
        self._refused: list[Outcome] = []

    # -- coming and going ---------------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Take a request in. One that can never be served is refused by the next `take_refused`."""
        num_prompt = group.sequences[0].num_prompt
        longest, widest = self._largest_request()
        fits = num_prompt <= longest and len(group.sequences) <= widest
        if not fits or not can_ever_hold(self.blocks, group):
            self.refuse(group, GenerationRefused)
            return
        # First come first served, and each step of priority counts like maxFirstTokenWaitTime of waiting: so
        # nobody starves, and as everybody ages alike the order never changes and needs no sorting again.
        # A probe stands before them all: behind users it would tell how long the queue is.
        age = group.arrival + group.priority * self.limits.max_first_token_wait_ms / 1e3
        group.rank = -math.inf if group.is_probe else age
        if group.params.beam_search:
            ends = group.stop_token_ids | (frozenset() if group.params.ignore_eos else self.eos)
            room = self.limits.max_seq_len - num_prompt
            group.beam_search = BeamSearch(len(group.sequences), min(group.params.max_tokens, room), ends)
        self.by_id[group.request_id] = group
        insort(self.waiting, group, key=rank_of)

    def _largest_request(self) -> tuple[int, int]:
        """Tokens of a prompt, and branches: both have to fit one prefill."""
        limits = self.limits
        tokens = min(limits.max_prefill_tokens, limits.max_seq_len - 1)
        return tokens, min(limits.max_prefill_batch_size, limits.max_batch_size)

    def refuse(self, group: SequenceGroup, error: type[ServerError]) -> None:
        """End a group that is in neither queue; the next `take_refused` tells of it."""
        branches = [seq.branch for seq in group.live]
        self._finish(group)
        for branch in branches:
            self._refused.append(Outcome(group.request_id, branch, -1, FinishCode.ERROR, error, 0))

    def abort(self, request_id: int, branch: int | None = None) -> bool:
        """End a request, or one of its branches, in any state without a record; False when it is not here."""
        group = self.by_id.get(request_id)
        if group is None:
            return False
        for seq in group.live:
            if branch is None or seq.branch == branch:
                self._end(seq)
        if not group.live:
            self._queue_of(group).remove(group)
            self._finish(group)
        elif group.prefilling:  # others may have counted on the blocks that are gone
            self.running.remove(group)
            self._send_back(group)
        return True

    def abort_all(self) -> int:
        """End every request without a record; how many there were."""
        self._refused.clear()
        return sum([self.abort(request_id) for request_id in list(self.by_id)])

    def _queue_of(self, group: SequenceGroup) -> list[SequenceGroup]:
        if group.status is GroupStatus.WAITING:
            return self.waiting
        return self.running if group.status is GroupStatus.RUNNING else self.swapped

    @property
    def groups(self) -> Iterable[SequenceGroup]:
        """All that have not ended."""
        return self.by_id.values()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    def take_refused(self) -> list[Outcome]:
        refused, self._refused = self._refused, []
        return refused

    def check(self) -> None:
        """Prove the invariants that must hold between steps. Raises EngineBug."""
        self.blocks.check(seq for group in self.running for seq in group.sequences)
        for group in self.running:
            assert group.status is GroupStatus.RUNNING and group.live, group
            ready = all(seq.num_computed == seq.num_tokens - 1 for seq in group.live)
            assert ready or group.prefilling, group
        self.swap.check(self.swapped)
        for group in self.swapped:
            assert group.status is GroupStatus.SWAPPED and group.live, group
            assert not any(seq.block_table for seq in group.sequences), group
        for group in self.waiting:
            assert group.status is GroupStatus.WAITING and group.live, group
            assert not any(seq.block_table or seq.num_computed for seq in group.sequences), group
            assert not group.prefilling, group
        assert len(self.by_id) == len(self.waiting) + len(self.running) + len(self.swapped)

    # -- giving way ---------------------------------------------------------------------------------

    def _give_way(self, *, may_swap: bool = True) -> SequenceGroup:
        """Preempt the last running group that can come back.

        A wide group shares blocks while it runs that each branch would need for itself to be computed again:
        sending it away could end it, so others go first.
        """
        able = (group for group in reversed(self.running) if can_ever_hold(self.blocks, group))
        victim = next(able, self.running[-1])
        self.running.remove(victim)
        self._preempt(victim, may_swap=may_swap)
        return victim

    def _preempt(self, group: SequenceGroup, *, may_swap: bool = True) -> None:
        """Take the blocks of a group, which is out of `running` already.

        It is swapped out where that may be and there is room; otherwise it goes back to be prefilled again
        with its output so far.
        """
        self.turn.num_preemptions += 1
        self.num_preemptions += 1
        group.num_preemptions += 1
        if not can_ever_hold(self.blocks, group):
            self.refuse(group, GenerationRefused)
            return
        may_swap &= self.turn.num_swaps < self.limits.max_preempt_count and not group.prefilling
        if may_swap and self.swap.put(group, self.blocks):
            self.turn.num_swaps += 1
            group.move(GroupStatus.SWAPPED)
            insort(self.swapped, group, key=rank_of)
            request_log.info(
                "request %d preempted, the %d. time: swapped out", group.request_id, group.num_preemptions
            )
            return
        self._send_back(group)
        request_log.info(
            "request %d preempted, the %d. time: %d tokens have to be computed again",
            group.request_id, group.num_preemptions, needs(self.blocks, group).tokens,
        )  # fmt: skip

    def _send_back(self, group: SequenceGroup) -> None:
        """From `running`, which it has left, to its place in `waiting`, with nothing computed."""
        for seq in group.sequences:
            self.blocks.release(seq)
            seq.num_computed = 0
        group.prefilling = False
        group.move(GroupStatus.WAITING)
        insort(self.waiting, group, key=rank_of)

    # -- endings ------------------------------------------------------------------------------------

    def finish_code(self, group: SequenceGroup, seq: Sequence, token: int) -> FinishCode:
        params = group.params
        if token in self.eos and not params.ignore_eos:
            return FinishCode.EOS
        if token in group.stop_token_ids:
            return FinishCode.STOP_TOKEN
        return FinishCode.LENGTH if self.is_full(group, seq) else FinishCode.NONE

    def is_full(self, group: SequenceGroup, seq: Sequence) -> bool:
        """Whether its newest token is the last one it may have."""
        return seq.num_output >= group.params.max_tokens or seq.num_tokens >= self.limits.max_seq_len

    def _end(self, seq: Sequence) -> None:
        seq.ended = True
        self.blocks.release(seq)

    def sweep(self, groups: Iterable[SequenceGroup]) -> None:
        """Free what their ended sequences hold, and take those of them without live ones out."""
        for group in groups:
            for seq in group.sequences:
                # an ended branch may still be the one that the prompt is computed in
                if seq.ended and seq.block_table and not group.prefilling:
                    self.blocks.release(seq)
            if not group.live:
                self._finish(group)
        self.running = [group for group in self.running if group.status is GroupStatus.RUNNING]

    def _finish(self, group: SequenceGroup) -> None:
        for seq in group.sequences:
            self._end(seq)
        self.swap.drop(group)
        group.move(GroupStatus.FINISHED)
        self.by_id.pop(group.request_id, None)


def rank_of(group: SequenceGroup) -> tuple[float, int]:
    return group.rank, group.request_id
