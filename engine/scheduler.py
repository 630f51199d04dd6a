"""Decides what runs next: prefill or decode, which requests, who gives way when blocks run out."""

from __future__ import annotations

import logging
import math
from bisect import insort
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from engine.beam import BeamSearch
from engine.block_manager import BlockManager
from engine.draft import Draft
from engine.errors import EngineFailed, GenerationRefused, GrammarFailed, ServerError
from engine.executor import NO_CONTINUATION, NO_TOKEN, NOT_YET, Sampled
from engine.group_blocks import allocate, can_ever_hold, needs
from engine.logs import REQUESTS, TOKENS
from engine.logs.codes import FIRST_TOKEN_LATE, code
from engine.outcome import FinishCode, Outcome
from engine.plan import StepKind, StepPlan
from engine.sequence import GroupStatus, Sequence, SequenceGroup
from engine.settings import ScheduleSettings
from engine.speculation import Speculation
from engine.swap_space import SwapSpace
from engine.told import beam_candidates, logprobs_of, prompt_outcomes, told_step, wait_us

log = logging.getLogger("llm.scheduler")
request_log = logging.getLogger(REQUESTS)
token_log = logging.getLogger(TOKENS)

# Decode goes first below this share of free blocks: a prefill would only be preempted again.
_LOW_BLOCKS = 0.05


class Scheduler:
    """Continuous batching over a paged cache; one call of `schedule` and one of `commit` per step.

    All queues are kept in the order of `SequenceGroup.rank`: `waiting` for a prefill, `running` for their
    next decode, `swapped` for room in the cache. All times are monotonic seconds given by the caller.
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
        self.num_preemptions = 0
        self.num_prefix_tokens = 0  # of prompts, looked up in the prefix cache
        self.num_prefix_hits = 0  # of them, found there
        self._by_id: dict[int, SequenceGroup] = {}
        self._eos = frozenset(eos_token_ids)
        self._refused: list[Outcome] = []
        self._step_started = 0.0
        self._step_preemptions = 0
        self._step_swaps = 0
        self._step_groups: list[SequenceGroup] = []
        self.speculation = Speculation(limits, blocks) if limits.guess_length else None

    # -- requests coming and going ------------------------------------------------------------------

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
            ends = group.stop_token_ids | (frozenset() if group.params.ignore_eos else self._eos)
            room = self.limits.max_seq_len - num_prompt
            group.beam_search = BeamSearch(len(group.sequences), min(group.params.max_tokens, room), ends)
        self._by_id[group.request_id] = group
        insort(self.waiting, group, key=_rank)

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
        group = self._by_id.get(request_id)
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
        return sum([self.abort(request_id) for request_id in list(self._by_id)])

    def _queue_of(self, group: SequenceGroup) -> list[SequenceGroup]:
        if group.status is GroupStatus.WAITING:
            return self.waiting
        return self.running if group.status is GroupStatus.RUNNING else self.swapped

    @property
    def groups(self) -> Iterable[SequenceGroup]:
        """All that have not ended."""
        return self._by_id.values()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    def take_refused(self) -> list[Outcome]:
        refused, self._refused = self._refused, []
        return refused

    # -- one step -----------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Choose the next step and allocate its blocks; None when nothing can or should run now."""
        self._begin_step(now)
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

    def _begin_step(self, now: float) -> None:
        self._step_started = now
        self._step_preemptions = self._step_swaps = 0

    def commit(self, plan: StepPlan, sampled: Sampled, now: float) -> list[Outcome]:
        """Apply what was sampled for `plan.samples` and end what is done."""
        outcomes = [
            row
            for request_id, scores in sampled.prompts.items()
            for row in prompt_outcomes(request_id, scores)
        ]
        for group in self._step_groups:
            group.waited += self._step_started - group.enqueued
        for request_id, scores in sampled.prompts.items():
            for seq in self._by_id[request_id].sequences:
                seq.num_told += len(scores.tokens)
        for seq, computed in zip(plan.sequences, plan.context_len.tolist(), strict=True):
            seq.num_computed = computed
        for seq in sampled.failed:
            outcomes += self._fail(self._by_id[seq.request_id])
        beams: dict[int, list[int]] = {}  # request -> its samples
        tokens = sampled.tokens.tolist()
        counts = None
        if plan.guessed is not None and self.speculation:
            counts = self.speculation.judge(plan, tokens)
        for index, seq in enumerate(plan.samples):
            if counts is not None and (seq.ended or not counts[index]):
                continue  # nothing follows an end, or a wrong guess
            group = self._by_id[seq.request_id]
            if tokens[index] == NOT_YET:
                self._hold_back(group, seq)
            elif group.beam_search is not None and tokens[index] >= 0:
                beams.setdefault(seq.request_id, []).append(index)
            else:
                outcomes.append(self._commit_sample(group, seq, sampled, index))
        for request_id, indices in beams.items():
            outcomes += self._commit_beams(plan, sampled, indices, self._by_id[request_id])
        if counts is not None:
            for seq in plan.sequences:
                seq.num_computed = seq.num_tokens - 1  # not what was computed behind a wrong guess
        for seq in plan.samples:
            self._by_id[seq.request_id].waited = 0.0
        spoilt = {seq.request_id for seq in sampled.failed}
        spoilt |= {
            seq.request_id for seq, token in zip(plan.samples, tokens, strict=True) if token == NO_TOKEN
        }
        for seq in plan.sequences:  # not sooner: a sample that is held back takes a token back
            if seq.request_id not in spoilt:
                self.blocks.publish(seq)
        for group in self._step_groups:
            group.enqueued = now
        if plan.sample_rows is not None or any(o.finish is not FinishCode.NONE for o in outcomes):
            self._sweep_ended()
        if token_log.isEnabledFor(logging.DEBUG):
            token_log.debug("%s", told_step(plan))
        return outcomes

    def _commit_sample(self, group: SequenceGroup, seq: Sequence, sampled: Sampled, index: int) -> Outcome:
        token, waited = int(sampled.tokens[index]), wait_us(group)
        if token < 0:
            seq.ended = True
            error = GrammarFailed if token == NO_CONTINUATION else EngineFailed
            return Outcome(seq.request_id, seq.branch, -1, FinishCode.ERROR, error, waited)
        if not seq.block_table:  # a branch that starts from the prompt of branch 0
            self.blocks.share(group.sequences[0], seq)
            seq.num_computed = seq.num_tokens
        seq.append(token)
        finish = self._finish_code(group, seq, token)
        # not released yet: its blocks may be what the next branch starts from
        seq.ended = finish is not FinishCode.NONE
        logprob, top = logprobs_of(sampled, index, group.params.logprobs)
        return Outcome(
            seq.request_id,
            seq.branch,
            token,
            finish,
            None,
            waited,
            logprob,
            top,
            preemptions=group.num_preemptions,
            cached_tokens=group.num_cached,
        )

    @staticmethod
    def _fail(group: SequenceGroup) -> list[Outcome]:
        """End a group of which something could not be computed."""
        live = group.live
        for seq in live:
            seq.ended = True
        return [
            Outcome(seq.request_id, seq.branch, -1, FinishCode.ERROR, EngineFailed, wait_us(group))
            for seq in live
        ]

    def _hold_back(self, group: SequenceGroup, seq: Sequence) -> None:
        """Leave a sample as it was; its newest token is computed again by the next step."""
        if not seq.block_table:
            self.blocks.share(group.sequences[0], seq)
        seq.num_computed = seq.num_tokens - 1

    def _commit_beams(
        self, plan: StepPlan, sampled: Sampled, indices: list[int], group: SequenceGroup
    ) -> list[Outcome]:
        """Advance a beam search; its rows come all at once, when it is done."""
        search = group.beam_search
        assert search is not None
        if not plan.samples[indices[0]].num_output:
            indices = indices[:1]  # all beams start from the one prompt
        candidates = beam_candidates(plan, sampled, indices, group.params.logprobs)
        search.advance(group.sequences, candidates, self.blocks)
        if not search.done:
            return []
        for seq in group.sequences:
            seq.ended = True
        return [
            Outcome(
                group.request_id,
                branch,
                step.token,
                self._beam_finish(group, step.token) if step is answer.steps[-1] else FinishCode.NONE,
                None,
                wait_us(group),
                step.logprob,
                step.top,
                preemptions=group.num_preemptions,
                cached_tokens=group.num_cached,
            )
            for branch, answer in enumerate(search.answers)
            for step in answer.steps
        ]

    def _beam_finish(self, group: SequenceGroup, token: int) -> FinishCode:
        if token in self._eos and not group.params.ignore_eos:
            return FinishCode.EOS
        return FinishCode.STOP_TOKEN if token in group.stop_token_ids else FinishCode.LENGTH

    def seconds_until_due(self, now: float) -> float | None:
        """How long the caller may sleep before `schedule` could do more; None where it has nothing to do."""
        if self.swapped:
            return 0.0
        if not self.waiting:
            return None
        if self.waiting[0].is_probe:
            return 0.0
        return max(0.0, self.waiting[0].arrival + self.limits.max_queue_delay_us / 1e6 - now)

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
        assert len(self._by_id) == len(self.waiting) + len(self.running) + len(self.swapped)

    def _plan(
        self,
        kind: StepKind,
        groups: list[SequenceGroup],
        guesses: Mapping[Sequence, int] | None = None,
    ) -> StepPlan:
        self._step_groups = groups
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
            insort(self.running, group, key=_rank)
        return batch

    def _num_running(self) -> int:
        return sum(len(group.live) for group in self.running)

    def _protect_first_token(self, now: float) -> None:
        """Free one running group's blocks for a newcomer that has waited too long for its first token."""
        head = next((group for group in self.waiting if not group.is_probe), None)
        if head is None or len(self.running) < 2:
            return
        waited_ms = (now - head.arrival) * 1e3
        short = needs(self.blocks, head).blocks > self.blocks.num_free
        if head.has_output or not short or waited_ms <= self.limits.max_first_token_wait_ms:
            return
        # it stays at the head until it runs: a victim before it would just take the blocks back
        head.rank = -math.inf
        victim = self._give_way(may_swap=False)  # it would come back before the newcomer
        log.warning(
            "request %d waited %.0f ms for its first token: preempted request %d for it",
            head.request_id, waited_ms, victim.request_id, extra=code(FIRST_TOKEN_LATE),
        )  # fmt: skip

    # -- decode -------------------------------------------------------------------------------------

    def _decode_batch(self) -> list[SequenceGroup]:
        """The running groups in their order, each branch with a slot for its newest token.

        When blocks run out another group gives way; the last resort is to give way oneself. When nobody had
        to, who has been swapped out comes back.
        """
        batch: list[SequenceGroup] = []
        width = 0
        for group in [group for group in self.running if not group.prefilling]:
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
        return batch if self._step_preemptions else batch + self._swap_in()

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
            insort(self.running, group, key=_rank)
            back.append(group)
        return back

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
        self._step_preemptions += 1
        self.num_preemptions += 1
        group.num_preemptions += 1
        if not can_ever_hold(self.blocks, group):
            self.refuse(group, GenerationRefused)
            return
        may_swap &= self._step_swaps < self.limits.max_preempt_count and not group.prefilling
        if may_swap and self.swap.put(group, self.blocks):
            self._step_swaps += 1
            group.move(GroupStatus.SWAPPED)
            insort(self.swapped, group, key=_rank)
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
        insort(self.waiting, group, key=_rank)

    # -- endings ------------------------------------------------------------------------------------

    def _finish_code(self, group: SequenceGroup, seq: Sequence, token: int) -> FinishCode:
        params = group.params
        if token in self._eos and not params.ignore_eos:
            return FinishCode.EOS
        if token in group.stop_token_ids:
            return FinishCode.STOP_TOKEN
        if seq.num_output >= params.max_tokens or seq.num_tokens >= self.limits.max_seq_len:
            return FinishCode.LENGTH
        return FinishCode.NONE

    def _end(self, seq: Sequence) -> None:
        seq.ended = True
        self.blocks.release(seq)

    def _sweep_ended(self) -> None:
        """Free what ended sequences hold, and take groups without live ones out."""
        for group in self._step_groups:
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
        self._by_id.pop(group.request_id, None)


def _rank(group: SequenceGroup) -> tuple[float, int]:
    return group.rank, group.request_id
