"""Scheduler and BlockManager: thousands of random schedules against their invariants, and each rule alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from engine.block_manager import BlockManager
from engine.errors import EngineBug, EngineFailed, GenerationRefused, GrammarFailed, ServerError
from engine.executor import NO_CONTINUATION, NO_TOKEN, NOT_YET, PromptScores, Sampled
from engine.outcome import FinishCode, Outcome
from engine.plan import StepKind, StepPlan
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import GroupStatus, Sequence, SequenceGroup
from engine.settings import ScheduleSettings
from engine.wire.messages import PROBE

EOS = 7
LIMITS = ScheduleSettings(
    block_size=4,
    max_prefill_batch_size=4,
    max_prefill_tokens=64,
    max_batch_size=8,
    max_iter_times=32,
    max_queue_delay_us=5000,
    max_first_token_wait_ms=2500,
    max_n=1,
    max_seq_len=64,
    max_input_len=48,
    truncation="off",
)


def make_scheduler(num_blocks: int = 64, **limits: int) -> Scheduler:
    settings = replace(LIMITS, **limits)  # type: ignore[arg-type]
    return Scheduler(settings, BlockManager(num_blocks, settings.block_size), [EOS])


def make_group(
    request_id: int, prompt: int, max_tokens: int = 8, now: float = 0.0, branches: int = 1, priority: int = 5
) -> SequenceGroup:
    params = SamplingParams(max_tokens, branches=branches)
    ids = np.arange(100, 100 + prompt, dtype=np.int32)
    return SequenceGroup(request_id, ids, params, priority=priority, now=now)


def run_step(scheduler: Scheduler, now: float, token: int = 1) -> tuple[StepPlan | None, list[Outcome]]:
    plan = scheduler.schedule(now)
    if plan is None:
        return None, []
    return plan, scheduler.commit(plan, Sampled(np.full(len(plan.samples), token, np.int32)), now)


def test_prefill_waits_for_the_queue_delay_then_decode_follows() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_group(1, prompt=5))
    assert scheduler.schedule(0.004) is None
    assert scheduler.seconds_until_due(0.004) == pytest.approx(0.001)
    plan, outcomes = run_step(scheduler, 0.005)
    assert plan is not None and plan.kind is StepKind.PREFILL
    assert plan.positions.tolist() == [0, 1, 2, 3, 4] and plan.context_len.tolist() == [5]
    assert outcomes[0].queue_wait_us == 5000
    plan, _ = run_step(scheduler, 0.006)
    assert plan is not None and plan.kind is StepKind.DECODE
    assert (
        plan.positions.tolist() == [5] and plan.input_ids.tolist() == [1] and plan.context_len.tolist() == [6]
    )


def test_a_full_batch_starts_at_once_when_the_engine_is_idle() -> None:
    scheduler = make_scheduler(max_prefill_batch_size=2)
    scheduler.add(make_group(1, 3))
    scheduler.add(make_group(2, 3))
    plan, _ = run_step(scheduler, 0.0)
    assert plan is not None and plan.num_rows == 2


def test_beside_running_decodes_a_full_batch_starts_early_only_for_long_delays() -> None:
    for delay_us, kind in ((5000, StepKind.DECODE), (6000, StepKind.PREFILL)):
        scheduler = make_scheduler(max_prefill_batch_size=1, max_queue_delay_us=delay_us)
        scheduler.add(make_group(1, 3))
        run_step(scheduler, 0.0)
        scheduler.add(make_group(2, 3, now=1.0))
        plan, _ = run_step(scheduler, 1.0)
        assert plan is not None and plan.kind is kind


def test_prefill_batch_respects_sequence_and_token_budgets_without_overtaking() -> None:
    scheduler = make_scheduler(max_prefill_tokens=48)
    for request_id, prompt in ((1, 30), (2, 20), (3, 5)):
        scheduler.add(make_group(request_id, prompt))
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [1]
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [2, 3]


def test_prompts_come_one_after_the_other_where_a_few_keep_the_device_busy() -> None:
    scheduler = make_scheduler(enough_prefill_tokens=16)
    for request_id, prompt in ((1, 8), (2, 8), (3, 30), (4, 5)):
        scheduler.add(make_group(request_id, prompt))
    steps = []
    for _ in range(3):
        plan, _ = run_step(scheduler, 1.0)
        assert plan is not None and plan.kind is StepKind.PREFILL
        steps.append([seq.request_id for seq in plan.sequences])
    assert steps == [[1, 2], [3], [4]]


def test_running_never_exceeds_the_batch_size() -> None:
    scheduler = make_scheduler(max_batch_size=3, max_prefill_batch_size=2)
    for request_id in range(6):
        scheduler.add(make_group(request_id, 2))
    for _ in range(4):
        run_step(scheduler, 1.0)
        assert len(scheduler.running) <= 3


def test_a_probe_goes_before_everybody_and_takes_nobodys_place() -> None:
    scheduler = make_scheduler(num_blocks=41, max_batch_size=1, max_prefill_batch_size=1, max_seq_len=200)
    scheduler.add(make_group(1, prompt=60, max_tokens=100))
    run_step(scheduler, 1.0)  # the batch is full
    scheduler.add(make_group(2, prompt=3, now=1.0, priority=1))
    scheduler.add(make_group(3, prompt=1, max_tokens=1, now=9.0, priority=PROBE))
    assert scheduler.seconds_until_due(9.0) == 0.0
    plan, outcomes = run_step(scheduler, 9.0)
    assert plan is not None and plan.kind is StepKind.PREFILL
    assert [(o.request_id, o.finish) for o in outcomes] == [(3, FinishCode.LENGTH)]
    assert [group.request_id for group in scheduler.running] == [1]  # not preempted
    plan, _ = run_step(scheduler, 9.0)
    assert plan is not None and [seq.request_id for seq in plan.samples] == [1]
    scheduler.check()


def test_nobody_is_preempted_for_a_probe_and_it_keeps_nobody_from_a_protected_first_token() -> None:
    scheduler = make_scheduler(num_blocks=4, max_queue_delay_us=0)
    for request_id in (1, 2):
        scheduler.add(make_group(request_id, prompt=7, max_tokens=30))
    run_step(scheduler, 0.0)  # no block is free
    scheduler.add(make_group(3, prompt=1, max_tokens=1, now=0.0, priority=PROBE))
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.DECODE and scheduler.num_preemptions == 0
    scheduler.add(make_group(4, prompt=3, now=1.0))
    scheduler._protect_first_token(100.0)
    assert scheduler.num_preemptions == 1 and 2 in [group.request_id for group in scheduler.waiting]


def test_decode_goes_first_when_few_blocks_are_free() -> None:
    scheduler = make_scheduler(num_blocks=41, max_prefill_tokens=200, max_seq_len=200)
    scheduler.add(make_group(1, prompt=160, max_tokens=30))  # 40 of 41 blocks: 2.4 % stay free
    run_step(scheduler, 1.0)
    scheduler.add(make_group(2, prompt=3, now=1.0))
    plan, _ = run_step(scheduler, 5.0)
    assert plan is not None and plan.kind is StepKind.DECODE


def test_the_youngest_gives_way_and_resumes_with_its_output() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_group(1, prompt=7))
    scheduler.add(make_group(2, prompt=7))
    for _ in range(2):  # prefill, then one decode that fills both second blocks
        run_step(scheduler, 1.0)
    plan, _ = run_step(scheduler, 1.0)  # both need a third block, none is left
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [1]
    assert scheduler.num_preemptions == 1
    victim = scheduler.waiting[0].sequences[0]
    assert victim.request_id == 2 and victim.num_output == 2 and not victim.block_table
    scheduler.abort(1)
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.PREFILL
    assert plan.input_ids.tolist() == [*range(100, 107), 1, 1]


def test_a_recomputed_sequence_is_not_resumed_into_the_last_free_block() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_group(1, prompt=7))
    scheduler.add(make_group(2, prompt=3))
    run_step(scheduler, 1.0)  # three blocks used
    victim = scheduler.running.pop()
    scheduler._preempt(victim)
    scheduler.add(make_group(3, prompt=3))
    scheduler.running[0].sequences[0].block_table.append(scheduler.blocks._take())  # one block left
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.DECODE


def test_a_starving_newcomer_takes_the_place_of_the_youngest() -> None:
    scheduler = make_scheduler(num_blocks=5, max_first_token_wait_ms=100)
    scheduler.add(make_group(1, prompt=8, max_tokens=30))
    scheduler.add(make_group(2, prompt=4, max_tokens=30))
    run_step(scheduler, 1.0)
    scheduler.add(make_group(3, prompt=12, now=1.0))  # three blocks, two are free
    plan, _ = run_step(scheduler, 1.05)
    assert plan is not None and plan.kind is StepKind.DECODE and plan.num_rows == 2
    assert scheduler.num_preemptions == 0
    plan, _ = run_step(scheduler, 2.0)
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [1]
    assert [seq.request_id for seq in scheduler.waiting] == [3, 2]


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    scheduler = make_scheduler(max_prefill_batch_size=1, max_first_token_wait_ms=1000)
    for request_id, priority, now in ((1, 5, 0.0), (2, 5, 0.1), (3, 1, 0.2), (4, 1, 4.05)):
        ids = np.array([1], np.int32)
        scheduler.add(SequenceGroup(request_id, ids, SamplingParams(1), priority=priority, now=now))
    order = []
    for _ in range(4):
        plan, _ = run_step(scheduler, 10.0)
        assert plan is not None
        order += [seq.request_id for seq in plan.sequences]
    assert order == [3, 1, 4, 2]  # 4 s of waiting are worth the four steps from 5 to 1


def test_a_recomputed_sequence_over_the_token_budget_runs_alone() -> None:
    scheduler = make_scheduler(num_blocks=64, max_prefill_tokens=8, max_seq_len=64)
    scheduler.add(make_group(1, prompt=8, max_tokens=20))
    for _ in range(3):
        run_step(scheduler, 1.0)
    scheduler._preempt(scheduler.running.pop())
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.PREFILL and plan.num_tokens == 11


def test_F17_what_can_never_fit_is_refused_once() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_group(1, prompt=40))
    refused = scheduler.take_refused()
    assert [(o.request_id, o.error) for o in refused] == [(1, GenerationRefused)]
    assert not scheduler.take_refused() and not scheduler.has_work


@pytest.mark.parametrize(
    ("params", "token", "expected"),
    [
        (SamplingParams(5), EOS, FinishCode.EOS),
        (SamplingParams(5, ignore_eos=True), EOS, FinishCode.NONE),
        (SamplingParams(5, stop_token_ids=(9,)), 9, FinishCode.STOP_TOKEN),
        (SamplingParams(5, stop_token_ids=(9,), ignore_eos=True), 9, FinishCode.STOP_TOKEN),
        (SamplingParams(1), 3, FinishCode.LENGTH),
        (SamplingParams(1), EOS, FinishCode.EOS),
        (SamplingParams(5), -1, FinishCode.ERROR),
    ],
)
def test_finish_codes(params: SamplingParams, token: int, expected: FinishCode) -> None:
    scheduler = make_scheduler()
    scheduler.add(SequenceGroup(1, np.array([1, 2], np.int32), params))
    _, outcomes = run_step(scheduler, 1.0, token)
    assert outcomes[0].finish is expected
    assert scheduler.has_work == (expected is FinishCode.NONE)
    scheduler.check()


@pytest.mark.parametrize(("code", "error"), [(NO_TOKEN, EngineFailed), (NO_CONTINUATION, GrammarFailed)])
def test_a_sample_that_is_no_token_says_why(code: int, error: type[ServerError]) -> None:
    scheduler = make_scheduler()
    scheduler.add(SequenceGroup(1, np.array([1, 2], np.int32), SamplingParams(5)))
    _, outcomes = run_step(scheduler, 1.0, code)
    assert [(o.token, o.finish, o.error) for o in outcomes] == [(-1, FinishCode.ERROR, error)]


def one_sequence(num_tokens: int) -> Sequence:
    return make_group(1, num_tokens).sequences[0]


def test_the_block_check_sees_a_wrong_count_of_owners() -> None:
    blocks = BlockManager(4, 4)
    first, second = one_sequence(4), one_sequence(4)
    blocks.grow(first)
    second.block_table.append(first.block_table[0])
    with pytest.raises(EngineBug):
        blocks.check([first, second])


def test_growing_is_all_or_nothing() -> None:
    blocks = BlockManager(2, 4)
    large, small = one_sequence(9), one_sequence(8)
    assert not blocks.grow(large) and not large.block_table and blocks.num_free == 2
    assert blocks.grow(small) and blocks.num_free == 0


def test_a_shared_block_is_copied_by_the_first_that_writes_and_freed_by_the_last() -> None:
    blocks = BlockManager(4, 4)
    first, second = one_sequence(6), one_sequence(6)
    blocks.grow(first)
    first.num_computed = 6
    blocks.share(first, second)
    second.num_computed = 6
    shared = list(first.block_table)
    for seq in (first, second):
        seq.append(1)
        assert blocks.grow(seq)
    assert first.block_table == [shared[0], 2] and second.block_table == shared
    assert blocks.take_copies() == [(shared[1], 2)] and not blocks.take_copies()
    blocks.check([first, second])
    blocks.release(first)
    blocks.check([second])
    blocks.release(second)
    assert blocks.num_free == 4


def test_branches_share_the_prompt_and_part_when_they_write() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_group(1, prompt=6, branches=3))
    plan = scheduler.schedule(1.0)
    assert plan is not None and plan.num_rows == 1 and len(plan.samples) == 3
    assert plan.sample_rows is not None and plan.sample_rows.tolist() == [0, 0, 0]
    outcomes = scheduler.commit(plan, Sampled(np.array([1, 2, 3], np.int32)), 1.0)
    assert [(o.branch, o.token) for o in outcomes] == [(0, 1), (1, 2), (2, 3)]
    scheduler.check()
    assert scheduler.blocks.num_free == 62
    plan = scheduler.schedule(1.0)
    assert plan is not None and plan.num_rows == 3 and plan.input_ids.tolist() == [1, 2, 3]
    assert len(plan.copies) == 2  # the last owner writes where it is
    assert scheduler.blocks.num_free == 60
    assert len(set(plan.slot_mapping.tolist())) == 3


def test_branches_without_a_first_token_yet_compute_the_end_of_the_prompt_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_group(1, prompt=6, branches=2))
    plan = scheduler.schedule(1.0)
    assert plan is not None
    assert [o.token for o in scheduler.commit(plan, Sampled(np.array([NOT_YET, 3], np.int32)), 1.0)] == [3]
    plan, outcomes = run_step(scheduler, 1.0, token=4)
    assert plan is not None and plan.kind is StepKind.DECODE
    assert plan.input_ids.tolist() == [105, 3] and plan.positions.tolist() == [5, 6]
    assert len(plan.copies) == 1, "the block they share is written by both"
    assert [o.token for o in outcomes] == [4, 4]
    scheduler.check()


def test_one_branch_can_end_or_be_aborted_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_group(1, prompt=6, branches=3))
    plan = scheduler.schedule(1.0)
    assert plan is not None
    scheduler.commit(plan, Sampled(np.array([EOS, 2, 3], np.int32)), 1.0)  # branch 0 held the prompt
    scheduler.check()
    assert scheduler.abort(1, branch=1)
    plan, outcomes = run_step(scheduler, 1.0)
    assert plan is not None and [o.branch for o in outcomes] == [2]
    assert scheduler.abort(1, branch=2) and not scheduler.abort(1)
    assert scheduler.blocks.num_free == 64


def test_a_group_is_preempted_and_resumed_as_a_whole_sharing_its_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_group(1, prompt=9, branches=2))
    for _ in range(3):
        run_step(scheduler, 1.0)
    scheduler._preempt(scheduler.running.pop())
    scheduler.check()
    assert scheduler.blocks.num_free == 64
    plan, outcomes = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.PREFILL and plan.num_rows == 2
    assert plan.query_start.tolist() == [
        0,
        12,
        16,
    ]  # the second branch computes only behind two shared blocks
    assert plan.block_table[0, :2].tolist() == plan.block_table[1, :2].tolist()
    assert [o.branch for o in outcomes] == [0, 1]
    scheduler.check()


def test_a_prompt_is_told_once_however_often_it_is_computed() -> None:
    """Preempted before its first token, too."""
    scheduler = make_scheduler()
    params = SamplingParams(4, prompt_logprobs=0, branches=2)
    scheduler.add(SequenceGroup(1, np.array([1, 2], np.int32), params))
    one = np.ones(1, np.int32)
    scores = PromptScores(one, np.zeros(1, np.float32), one, *(np.empty((1, 0)) for _ in range(2)))
    told = []
    for tokens in ([NOT_YET, NOT_YET], [NOT_YET, 5]):
        plan = scheduler.schedule(1.0)
        assert plan is not None and plan.kind is StepKind.PREFILL
        prompts = {seq.request_id: scores for seq in plan.sequences if seq.owes_prompt_scores}
        sampled = Sampled(np.array(tokens, np.int32), prompts=prompts)
        told.append([outcome.rank for outcome in scheduler.commit(plan, sampled, 1.0)])
        scheduler._preempt(scheduler.running.pop())
        scheduler.check()
    assert told == [[1], [0]]
    plan = scheduler.schedule(1.0)
    assert plan is not None and not any(seq.owes_prompt_scores for seq in plan.sequences)


def test_logprobs_reach_the_outcomes_only_where_asked() -> None:
    scheduler = make_scheduler()
    ids = np.array([1, 2], np.int32)
    for request_id, wanted in ((1, -1), (2, 0), (3, 2)):
        scheduler.add(SequenceGroup(request_id, ids, SamplingParams(4, logprobs=wanted)))
    plan = scheduler.schedule(1.0)
    assert plan is not None
    sampled = Sampled(
        np.array([5, 6, 7], np.int32),
        np.array([0, -0.5, -1.0], np.float32),
        np.array([[0, 0, 0], [6, 1, 2], [3, 7, 4]], np.int32),
        np.array([[0, 0, 0], [-0.5, -1, -2], [-0.25, -1, -3]], np.float32),
    )
    outcomes = scheduler.commit(plan, sampled, 1.0)
    assert [(o.logprob, list(o.top)) for o in outcomes] == [
        (0.0, []),
        (-0.5, []),
        (-1.0, [(3, -0.25), (7, -1.0)]),
    ]


@pytest.mark.parametrize("first_seed", range(0, 2000, 100))
def test_random_schedules_keep_every_invariant(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        run_random_schedule(seed)


def run_random_schedule(seed: int) -> None:
    """Random arrivals, aborts, lengths and tokens.

    After every step: blocks add up, slots of a plan are distinct and inside the pool, no budget is
    exceeded; at the end every request has ended exactly once and no token was lost or repeated.
    """
    rng = random.Random(seed)
    num_blocks = rng.choice([17, 24, 64])
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        max_batch_size=rng.choice([2, 5, 8]),
        max_prefill_batch_size=rng.choice([1, 2, 4]),
        max_first_token_wait_ms=rng.choice([0, 20, 2500]),
        max_prefill_tokens=rng.choice([60, 64]),
    )
    limits = scheduler.limits
    # by (request, branch): what it was given, in order, and how it ended
    expected: dict[tuple[int, int], list[int]] = {}
    ended: dict[tuple[int, int], FinishCode | None] = {}  # None: aborted
    groups: dict[int, SequenceGroup] = {}
    now, next_id = 0.0, 0

    def note(outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            key = outcome.request_id, outcome.branch
            assert key not in ended, "a row after the end"
            if outcome.token >= 0:
                expected[key].append(outcome.token)
            if outcome.finish is not FinishCode.NONE:
                ended[key] = outcome.finish

    for step in range(120):
        arriving = step < 40
        if arriving and rng.random() < 0.6:
            if rng.random() < 0.1:
                group = make_group(next_id, prompt=1, max_tokens=1, now=now, priority=PROBE)
            else:
                width = rng.choice([1, 1, 2, 3])
                group = make_group(next_id, rng.randint(1, 60), rng.randint(1, 20), now, width)
                group.priority = rng.randint(1, 5)
            groups[next_id] = group
            for seq in group.sequences:
                expected[next_id, seq.branch] = []
            scheduler.add(group)
            next_id += 1
        if rng.random() < 0.05 and groups:
            victim = rng.choice(list(groups.values()))
            branch = rng.choice([None, None, *range(len(victim.sequences))])
            here = {seq.branch for seq in victim.live if branch in (None, seq.branch)}
            if scheduler.abort(victim.request_id, branch):
                ended |= {(victim.request_id, b): None for b in here}
            if branch is None:
                assert not scheduler.abort(victim.request_id)
        note(scheduler.take_refused())
        plan = scheduler.schedule(now)
        if plan is not None:
            assert len(set(plan.slot_mapping.tolist())) == plan.num_tokens
            assert plan.slot_mapping.min() >= 0 and plan.slot_mapping.max() < num_blocks * limits.block_size
            assert len(plan.samples) <= limits.max_batch_size
            if plan.kind is StepKind.PREFILL:
                assert len(plan.samples) <= limits.max_prefill_batch_size
                assert (
                    plan.num_tokens <= limits.max_prefill_tokens
                    or len({s.request_id for s in plan.samples}) == 1
                )
            tokens = np.array(
                [
                    rng.choice([1, 2, 3, EOS, NO_TOKEN, NOT_YET, NOT_YET]) if rng.random() < 0.15 else 1
                    for _ in plan.samples
                ],
                np.int32,
            )
            note(scheduler.commit(plan, Sampled(tokens), now))
        note(scheduler.take_refused())
        scheduler.check()
        for queue in (scheduler.waiting, scheduler.running):
            assert [s.rank for s in queue] == sorted(s.rank for s in queue)
        now += rng.choice([0.0001, 0.01])
    for _ in range(2000):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule(now)
        note(scheduler.take_refused())
        if plan is not None:
            note(scheduler.commit(plan, Sampled(np.ones(len(plan.samples), np.int32)), now))
        scheduler.check()
        now += 0.01
    assert ended.keys() == expected.keys()
    assert scheduler.blocks.num_free == num_blocks
    for request_id, group in groups.items():
        assert group.status is GroupStatus.FINISHED
        for seq in group.sequences:
            assert seq.output_ids.tolist() == expected[request_id, seq.branch]
