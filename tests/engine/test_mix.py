"""templateType Mix: whatever a step is made of, answers are those of whole prompts; and each rule alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_manager import BlockManager
from engine.errors import EngineFailed
from engine.executor import Sampled
from engine.mix import make_scheduler
from engine.outcome import FinishCode
from engine.pacing import ChunkPacer
from engine.plan import StepKind
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceGroup
from engine.settings import MixSettings, ScheduleSettings
from engine.wire.messages import PROBE
from tests.engine.fake_model import LIMITS as PLAIN
from tests.engine.fake_model import TEXTS, Ask, Machine, asks, same
from worker.mock import EchoExecutor

MIX = MixSettings(chunk_size=0, max_partial=64, long_threshold=1024, max_long_partial=8)
LIMITS = replace(PLAIN, max_prefill_batch_size=6, max_prefill_tokens=16, mix=MIX)


def machine(num_blocks: int = 64, *, limits: ScheduleSettings = LIMITS, **mix: int) -> Machine:
    return Machine(replace(limits, mix=replace(MIX, **mix)), num_blocks)


def lengths(served: Machine) -> list[list[int]]:
    """Query tokens of every row of every step."""
    return [np.diff(plan.query_start).tolist() for plan in served.plans]


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(asks(TEXTS), min_size=1, max_size=10),
    num_blocks=st.sampled_from((20, 26, 64)),
    budget=st.sampled_from((7, 16, 64)),
    prefix_cache=st.booleans(),
    host_blocks=st.sampled_from((0, 5, 40)),
    mix=st.builds(
        MixSettings,
        chunk_size=st.sampled_from((0, 0, 1, 3, 7)),
        max_partial=st.sampled_from((1, 2, 64)),
        long_threshold=st.sampled_from((10, 1024)),
        max_long_partial=st.just(1),
    ),
)
def test_answers_are_those_of_whole_prompts(
    requests: list[Ask], num_blocks: int, budget: int, prefix_cache: bool, host_blocks: int, mix: MixSettings
) -> None:
    """20 blocks are too few for most of them at once: they preempt each other, some in mid-prompt."""
    plain = Machine(replace(LIMITS, mix=None, max_prefill_tokens=64), num_blocks=640)
    want = plain.serve(replace(ask, hangs_up=0) for ask in requests)
    limits = replace(
        LIMITS, mix=mix, max_prefill_tokens=budget, prefix_cache=prefix_cache, max_preempt_count=2
    )
    mixed = Machine(limits, num_blocks, host_blocks)
    assert same(mixed.serve(requests), want, requests)
    assert all(plan.num_tokens <= budget for plan in mixed.plans)


def test_a_prompt_longer_than_a_step_comes_in_pieces_and_the_last_one_samples() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:40], max_tokens=3)])
    assert lengths(served)[:4] == [[16], [16], [8], [1]]
    assert [len(plan.samples) for plan in served.plans][:4] == [0, 0, 1, 1]
    assert all(plan.kind is StepKind.PREFILL for plan in served.plans[:3])


def test_who_decodes_does_so_in_every_step_and_comes_first() -> None:
    served = machine(chunk_size=5)
    served.serve([Ask(TEXTS[0][:4], 12), Ask(TEXTS[1][:4], 12), Ask(TEXTS[1][:20], 4, turn=2)])
    mixed = [plan for plan in served.plans if plan.kind is StepKind.MIXED]
    assert [np.diff(plan.query_start).tolist() for plan in mixed] == [[1, 1, 5]] * 4
    assert [[seq.request_id for seq in plan.samples] for plan in mixed] == [[0, 1]] * 3 + [[0, 1, 2]]


def test_a_step_has_room_for_the_next_prompt_behind_the_end_of_one() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:20], 1), Ask(TEXTS[1][:20], 1)])
    assert lengths(served) == [[16], [4, 12], [8]]


def test_at_most_so_many_prompts_are_partly_computed() -> None:
    served = machine(chunk_size=2, max_partial=2)
    served.serve([Ask(TEXTS[0][:8], 1) for _ in range(4)])
    assert max(plan.num_rows - len(plan.samples) for plan in served.plans) == 2


def test_short_prompts_pass_long_ones_of_which_enough_are_under_way() -> None:
    served = machine(chunk_size=4, long_threshold=10, max_long_partial=1)
    served.serve([Ask(TEXTS[0][:30], 1), Ask(TEXTS[1][:30], 1), Ask(TEXTS[1][:4], 1)])
    assert [seq.request_id for seq in served.plans[0].sequences] == [0, 2]
    order = list(dict.fromkeys(seq.request_id for plan in served.plans for seq in plan.sequences))
    assert order == [0, 2, 1]


def test_what_was_preempted_computes_all_but_its_newest_token_and_decodes() -> None:
    served = machine()
    served.add(0, Ask(TEXTS[0][:14], max_tokens=12, branches=2))
    for _ in range(6):
        served.turn()
    (group,) = served.scheduler.running
    served.scheduler.running.clear()
    served.scheduler._preempt(group)
    lacking = [seq.num_tokens - 1 for seq in group.live]
    served.plans.clear()
    served.serve([])
    assert lengths(served)[0] == [16] and not served.plans[0].samples
    assert (
        sum(sum(rows) for rows in lengths(served)[:2]) == lacking[0] + lacking[1] - 12
    )  # three blocks shared
    assert lengths(served)[2] == [1, 1]


def test_a_prompt_whose_first_branch_leaves_in_the_middle_begins_again() -> None:
    served = machine()
    served.add(0, Ask(TEXTS[0][:30], max_tokens=3, branches=2))
    served.turn()
    assert served.scheduler.abort(0, 0)
    served.scheduler.check()
    assert served.blocks.num_free == 64 and served.scheduler.num_preemptions == 0
    served.plans.clear()
    served.serve([])
    assert lengths(served)[:2] == [[16], [14]] and not served.answers[0][0] and len(served.answers[0][1]) == 3


def test_a_probe_needs_no_place_in_the_batch() -> None:
    served = machine(limits=replace(LIMITS, max_batch_size=1))
    served.add(0, Ask(TEXTS[0][:4], 20))
    served.turn()
    served.add(1, Ask(TEXTS[1][:4], 20))
    ids = np.array([1], np.int32)
    served.scheduler.add(SequenceGroup(2, ids, SamplingParams(1), priority=PROBE, now=served.now))
    served.answers[2] = [[]]
    served.turn()
    assert len(served.answers[2][0]) == 1 and not served.answers[1][0]


def test_a_chunk_that_cannot_be_computed_ends_its_request() -> None:
    served = machine()
    served.add(0, Ask(TEXTS[0][:40], 2))
    served.scheduler.add(Ask(TEXTS[1][:4], 2).group(1, served.now))
    plan = served.scheduler.schedule(served.now)
    assert plan is not None and not plan.samples
    empty = Sampled(np.empty(0, np.int32), failed=plan.sequences)
    outcomes = served.scheduler.commit(plan, empty, served.now)
    assert [(o.request_id, o.finish, o.error) for o in outcomes] == [(0, FinishCode.ERROR, EngineFailed)]
    served.scheduler.check()
    assert [group.request_id for group in served.scheduler.waiting] == [1] and not served.scheduler.running


def test_the_wait_of_a_first_token_is_that_for_its_first_step() -> None:
    served = machine()
    group = Ask(TEXTS[0][:40], 2).group(0, now=1.0)
    served.scheduler.add(group)
    waits = []
    for start, end in ((3.0, 4.0), (4.0, 5.0), (5.5, 7.0), (7.0, 8.0)):
        plan = served.scheduler.schedule(start)
        assert plan is not None
        waits += [o.queue_wait_us for o in served.scheduler.commit(plan, served.model.run(plan), end)]
    assert waits == [2_500_000, 0]


@pytest.mark.parametrize("branches", [1, 2])
def test_a_prompt_that_is_to_be_judged_is_told_once_in_its_order(branches: int) -> None:
    """Also when it is preempted in the middle."""
    scheduler = make_scheduler(LIMITS, BlockManager(64, 4), [])
    executor = EchoExecutor(1000, 0)
    params = SamplingParams(2, prompt_logprobs=1, branches=branches)
    scheduler.add(SequenceGroup(0, np.array(TEXTS[0][:40], np.int32), params))
    told: list[int] = []
    for step in range(20):
        plan = scheduler.schedule(float(step))
        if plan is None:
            break
        outcomes = scheduler.commit(plan, executor.run(plan), float(step))
        told += [outcome.token for outcome in outcomes if outcome.rank]
        if step == 1:
            scheduler._preempt(scheduler.running.pop())
    assert told == list(TEXTS[0][1:40])


# -- the size of a chunk ------------------------------------------------------------------------------


def paced(decode_s: float, token_s: float, rows: int = 8) -> list[int]:
    """The chunks of 30 steps beside so many rows, on a machine where they cost so much."""
    pacer = ChunkPacer()
    for _ in range(5):
        pacer.note(rows, 0, decode_s)
    chunks = []
    for _ in range(30):
        chunks.append(pacer.tokens(rows))
        pacer.note(rows, chunks[-1], decode_s + chunks[-1] * token_s)
    return chunks


@given(st.floats(1e-4, 1.0), st.floats(1e-6, 1e-2), st.integers(1, 64))
def test_a_mixed_step_takes_little_more_than_twice_a_decode_step(
    decode_s: float, token_s: float, rows: int
) -> None:
    last = paced(decode_s, token_s, rows)[-1]
    assert (rows + last) % 16 == 0 or last == 16
    fits = 1.2 * decode_s / token_s
    assert last == 16 or last <= fits * 1.001
    assert last >= min(fits - 16, 10_000)


def test_a_chunk_grows_by_doubling_however_little_a_token_costs() -> None:
    assert paced(0.01, 0.0)[:4] == [16, 24, 40, 72]


def test_what_is_not_known_yet_is_small() -> None:
    assert ChunkPacer().tokens(8) == 16


def test_a_step_that_was_disturbed_counts_for_nothing() -> None:
    pacer = ChunkPacer()
    for seconds in (0.1, 0.1, 9.0, 0.1):
        pacer.note(8, 0, seconds)
        pacer.note(8, 32, 0.1 + seconds)
    assert pacer.tokens(8) == 24  # 0.12 s are worth 38 tokens, and 40 + 8 would be too many


def test_who_comes_back_from_the_prefix_cache_counts_in_the_budget() -> None:
    """Nothing of it is computed again, so it decodes at once, beside a piece that has filled the step."""
    text = (85, 64, 51, 27, 31, 5, 8, 2, 18, 81, 65, 91, 50, 61, 97, 73, 63, 54, 56, 93, 28, 81, 67, 1, 40,
            85, 55, 4, 76, 73, 84, 18, 9, 86, 3)  # fmt: skip
    other = (47, 51, 75, 95, 4, 15, 82, 94, 25, 31, 87, 42, 28, 82, 26, 41, 64, 55, 9, 3, 86, 75, 83, 54,
             81, 33, 45, 79, 13, 31, 13, 45, 97)  # fmt: skip
    asks = [*[Ask(text[:1], 1)] * 6, Ask(text[:6], 1, turn=1), Ask(text[:1], 1, turn=1)]
    asks += [Ask(other, 9, ignore_eos=True), Ask(text, 3, salt=b"a")]
    mix = MixSettings(chunk_size=0, max_partial=1, long_threshold=10, max_long_partial=1)
    served = Machine(
        replace(LIMITS, mix=mix, max_prefill_tokens=7, prefix_cache=True, max_preempt_count=2), 20
    )
    served.serve(asks)
    assert [1, 6] in lengths(served) and max(map(sum, lengths(served))) == 7
