"""Scheduler and BlockManager: thousands of random schedules against their invariants, and each rule alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from engine.block_manager import BlockManager
from engine.errors import EngineBug, GenerationRefused
from engine.outcome import FinishCode, Outcome
from engine.plan import StepKind, StepPlan
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SeqStatus, Sequence
from engine.settings import ScheduleSettings

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


def make_seq(request_id: int, prompt: int, max_tokens: int = 8, now: float = 0.0) -> Sequence:
    return Sequence(
        request_id, np.arange(100, 100 + prompt, dtype=np.int32), SamplingParams(max_tokens), now=now
    )


def run_step(scheduler: Scheduler, now: float, token: int = 1) -> tuple[StepPlan | None, list[Outcome]]:
    plan = scheduler.schedule(now)
    if plan is None:
        return None, []
    return plan, scheduler.commit(plan, np.full(plan.num_rows, token, np.int32), now)


def test_prefill_waits_for_the_queue_delay_then_decode_follows() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq(1, prompt=5))
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
    scheduler.add(make_seq(1, 3))
    scheduler.add(make_seq(2, 3))
    plan, _ = run_step(scheduler, 0.0)
    assert plan is not None and plan.num_rows == 2


def test_beside_running_decodes_a_full_batch_starts_early_only_for_long_delays() -> None:
    for delay_us, kind in ((5000, StepKind.DECODE), (6000, StepKind.PREFILL)):
        scheduler = make_scheduler(max_prefill_batch_size=1, max_queue_delay_us=delay_us)
        scheduler.add(make_seq(1, 3))
        run_step(scheduler, 0.0)
        scheduler.add(make_seq(2, 3, now=1.0))
        plan, _ = run_step(scheduler, 1.0)
        assert plan is not None and plan.kind is kind


def test_prefill_batch_respects_sequence_and_token_budgets_without_overtaking() -> None:
    scheduler = make_scheduler(max_prefill_tokens=48)
    for request_id, prompt in ((1, 30), (2, 20), (3, 5)):
        scheduler.add(make_seq(request_id, prompt))
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [1]
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [2, 3]


def test_running_never_exceeds_the_batch_size() -> None:
    scheduler = make_scheduler(max_batch_size=3, max_prefill_batch_size=2)
    for request_id in range(6):
        scheduler.add(make_seq(request_id, 2))
    for _ in range(4):
        run_step(scheduler, 1.0)
        assert len(scheduler.running) <= 3


def test_decode_goes_first_when_few_blocks_are_free() -> None:
    scheduler = make_scheduler(num_blocks=41, max_prefill_tokens=200, max_seq_len=200)
    scheduler.add(make_seq(1, prompt=160, max_tokens=30))  # 40 of 41 blocks: 2.4 % stay free
    run_step(scheduler, 1.0)
    scheduler.add(make_seq(2, prompt=3, now=1.0))
    plan, _ = run_step(scheduler, 5.0)
    assert plan is not None and plan.kind is StepKind.DECODE


def test_the_youngest_gives_way_and_resumes_with_its_output() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_seq(1, prompt=7))
    scheduler.add(make_seq(2, prompt=7))
    for _ in range(2):  # prefill, then one decode that fills both second blocks
        run_step(scheduler, 1.0)
    plan, _ = run_step(scheduler, 1.0)  # both need a third block, none is left
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [1]
    assert scheduler.num_preemptions == 1
    victim = scheduler.waiting[0]
    assert victim.request_id == 2 and victim.num_output == 2 and not victim.block_table
    scheduler.abort(1)
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.PREFILL
    assert plan.input_ids.tolist() == [*range(100, 107), 1, 1]


def test_a_recomputed_sequence_is_not_resumed_into_the_last_free_block() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_seq(1, prompt=7))
    scheduler.add(make_seq(2, prompt=3))
    run_step(scheduler, 1.0)  # three blocks used
    victim = scheduler.running.pop()
    scheduler._preempt(victim)
    scheduler.add(make_seq(3, prompt=3))
    scheduler.running[0].block_table.append(scheduler.blocks._free.pop())  # one block left
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.DECODE


def test_a_starving_newcomer_takes_the_place_of_the_youngest() -> None:
    scheduler = make_scheduler(num_blocks=5, max_first_token_wait_ms=100)
    scheduler.add(make_seq(1, prompt=8, max_tokens=30))
    scheduler.add(make_seq(2, prompt=4, max_tokens=30))
    run_step(scheduler, 1.0)
    scheduler.add(make_seq(3, prompt=12, now=1.0))  # three blocks, two are free
    plan, _ = run_step(scheduler, 1.05)
    assert plan is not None and plan.kind is StepKind.DECODE and plan.num_rows == 2
    assert scheduler.num_preemptions == 0
    plan, _ = run_step(scheduler, 2.0)
    assert plan is not None and [seq.request_id for seq in plan.sequences] == [1]
    assert [seq.request_id for seq in scheduler.waiting] == [3, 2]


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    scheduler = make_scheduler(max_prefill_batch_size=1, max_first_token_wait_ms=1000)
    for request_id, priority, now in ((1, 5, 0.0), (2, 5, 0.1), (3, 1, 0.2), (4, 1, 4.05)):
        seq = Sequence(request_id, np.array([1], np.int32), SamplingParams(1), priority=priority, now=now)
        scheduler.add(seq)
    order = []
    for _ in range(4):
        plan, _ = run_step(scheduler, 10.0)
        assert plan is not None
        order += [seq.request_id for seq in plan.sequences]
    assert order == [3, 1, 4, 2]  # 4 s of waiting are worth the four steps from 5 to 1


def test_a_recomputed_sequence_over_the_token_budget_runs_alone() -> None:
    scheduler = make_scheduler(num_blocks=64, max_prefill_tokens=8, max_seq_len=64)
    scheduler.add(make_seq(1, prompt=8, max_tokens=20))
    for _ in range(3):
        run_step(scheduler, 1.0)
    scheduler._preempt(scheduler.running.pop())
    plan, _ = run_step(scheduler, 1.0)
    assert plan is not None and plan.kind is StepKind.PREFILL and plan.num_tokens == 11


def test_what_can_never_fit_is_refused_once() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_seq(1, prompt=40))
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
    scheduler.add(Sequence(1, np.array([1, 2], np.int32), params))
    _, outcomes = run_step(scheduler, 1.0, token)
    assert outcomes[0].finish is expected
    assert scheduler.has_work == (expected is FinishCode.NONE)
    scheduler.check()


def test_the_block_check_sees_a_block_owned_twice() -> None:
    blocks = BlockManager(4, 4)
    first, second = make_seq(1, 4), make_seq(2, 4)
    blocks.grow(first, 4)
    second.block_table.append(first.block_table[0])
    with pytest.raises(EngineBug):
        blocks.check([first, second])


def test_growing_is_all_or_nothing() -> None:
    blocks = BlockManager(2, 4)
    seq = make_seq(1, 4)
    assert not blocks.grow(seq, 9) and not seq.block_table and blocks.num_free == 2
    assert blocks.grow(seq, 8) and blocks.num_free == 0


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
        max_prefill_batch_size=rng.choice([1, 2]),
        max_first_token_wait_ms=rng.choice([0, 20, 2500]),
        max_prefill_tokens=rng.choice([60, 64]),
    )
    limits = scheduler.limits
    expected: dict[int, list[int]] = {}  # what each request was given, in order
    ended: dict[int, FinishCode] = {}
    sequences: dict[int, Sequence] = {}
    now, next_id = 0.0, 0

    def note(outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.request_id not in ended, "a row after the end"
            if outcome.token >= 0:
                expected[outcome.request_id].append(outcome.token)
            if outcome.finish is not FinishCode.NONE:
                ended[outcome.request_id] = outcome.finish

    for step in range(120):
        arriving = step < 40
        if arriving and rng.random() < 0.6:
            seq = make_seq(next_id, rng.randint(1, 60), rng.randint(1, 20), now)
            seq.priority = rng.randint(1, 5)
            expected[next_id] = []
            sequences[next_id] = seq
            scheduler.add(seq)
            next_id += 1
        if rng.random() < 0.05 and sequences:
            victim = rng.choice(list(sequences))
            if scheduler.abort(victim):
                ended[victim] = FinishCode.ABORTED
            assert not scheduler.abort(victim)
        note(scheduler.take_refused())
        plan = scheduler.schedule(now)
        if plan is not None:
            assert len(set(plan.slot_mapping.tolist())) == plan.num_tokens
            assert plan.slot_mapping.min() >= 0 and plan.slot_mapping.max() < num_blocks * limits.block_size
            assert plan.num_rows <= limits.max_batch_size
            if plan.kind is StepKind.PREFILL:
                assert plan.num_rows <= limits.max_prefill_batch_size
                assert plan.num_tokens <= limits.max_prefill_tokens or plan.num_rows == 1
            tokens = np.array(
                [rng.choice([1, 2, 3, EOS, -1]) if rng.random() < 0.1 else 1 for _ in plan.sequences],
                np.int32,
            )
            note(scheduler.commit(plan, tokens, now))
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
            note(scheduler.commit(plan, np.ones(plan.num_rows, np.int32), now))
        scheduler.check()
        now += 0.01
    assert ended.keys() == expected.keys()
    assert scheduler.blocks.num_free == num_blocks
    for request_id, seq in sequences.items():
        assert seq.status is SeqStatus.FINISHED
        assert seq.output_ids.tolist() == expected[request_id]
