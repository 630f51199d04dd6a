"""Preemption into the host's memory: nothing is computed twice, and answers are those of a large cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineBug
from engine.plan import StepKind
from engine.sampling_params import SamplingParams
from engine.sequence import GroupStatus, SequenceGroup
from engine.settings import MixSettings, ScheduleSettings
from engine.wire.messages import PROBE
from tests.engine.fake_model import LIMITS as PLAIN
from tests.engine.fake_model import TEXTS, Ask, Machine, asks, same

LIMITS = replace(PLAIN, max_preempt_count=2)


def machine(num_blocks: int, num_host_blocks: int = 40, limits: ScheduleSettings = LIMITS) -> Machine:
    return Machine(limits, num_blocks, num_host_blocks)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(asks(TEXTS), min_size=1, max_size=10),
    st.sampled_from((20, 26)),
    st.sampled_from((5, 40)),
    st.booleans(),
)
def test_answers_are_those_of_a_large_cache(
    requests: list[Ask], num_blocks: int, num_host_blocks: int, prefix_cache: bool
) -> None:
    """With little room in the host's memory some are computed again instead."""
    want = Machine(LIMITS, 640).serve(replace(ask, hangs_up=0) for ask in requests)
    swapping = Machine(replace(LIMITS, prefix_cache=prefix_cache), num_blocks, num_host_blocks)
    assert same(swapping.serve(requests), want, requests)


def two_of_which_one_has_to_go(**limits: int) -> Machine:
    """Two requests grow from two blocks each to six; there are seven."""
    served = machine(7, limits=replace(LIMITS, max_seq_len=28, **limits))  # type: ignore[arg-type]
    served.serve([Ask(TEXTS[0][:8], 16), Ask(TEXTS[1][:8], 16)])
    return served


def test_who_comes_back_goes_on_where_it_was() -> None:
    served = two_of_which_one_has_to_go()
    assert served.scheduler.num_preemptions == 1
    assert [plan.kind for plan in served.plans].count(StepKind.PREFILL) == 1
    assert sum(plan.num_tokens for plan in served.plans) == 2 * (8 + 15)
    (out,) = (plan for plan in served.plans if plan.swap_out)
    (back,) = (plan for plan in served.plans if plan.swap_in)
    assert [seq.request_id for seq in out.sequences] == [0]
    assert [seq.request_id for seq in back.sequences] == [1]
    hosts = [host for _, host in out.swap_out]
    assert [host for host, _ in back.swap_in] == hosts and len(set(hosts)) == 3


def test_without_a_count_everything_is_computed_again() -> None:
    served = two_of_which_one_has_to_go(max_preempt_count=0)
    assert served.scheduler.num_preemptions == 1
    assert not any(plan.swap_out or plan.swap_in for plan in served.plans)
    assert sum(plan.num_tokens for plan in served.plans) > 2 * (8 + 15)


def test_branches_share_in_the_host_what_they_shared_in_the_cache() -> None:
    served = machine(64)
    served.add(0, Ask(TEXTS[0][:9], 8, branches=3))
    served.turn()
    served.turn()  # each has a block of its own behind two shared ones
    (group,) = served.scheduler.running
    served.scheduler.running.clear()
    served.scheduler._preempt(group)
    served.scheduler.check()
    assert group.status is GroupStatus.SWAPPED
    assert served.blocks.num_free == 64 and served.scheduler.swap.num_free == 40 - 5
    served.serve([])
    assert served.answers == Machine(LIMITS, 64).serve([Ask(TEXTS[0][:9], 8, branches=3)])


def test_what_was_to_be_copied_for_a_branch_goes_out_from_where_it_is() -> None:
    """The first branch has got its copy, not made yet, when there is no block for that of the second."""
    requests = [Ask(TEXTS[1][:12], 6), Ask(TEXTS[0][:9], 6, branches=3)]
    served = machine(8, limits=replace(LIMITS, max_seq_len=20))
    served.add(0, requests[0])
    served.add(1, requests[1])
    served.turn()
    plan = served.turn()
    assert plan is not None and len(plan.swap_out) == 4 and not plan.copies
    served.serve([])
    assert served.answers == Machine(LIMITS, 64).serve(requests)


def test_nobody_begins_before_those_who_had_to_go() -> None:
    served = machine(8, limits=replace(LIMITS, max_seq_len=28))
    requests = [Ask(TEXTS[0][:8], 16), Ask(TEXTS[1][:8], 16), Ask(TEXTS[0][:4], 1, turn=12)]
    served.serve(requests)
    back = next(number for number, plan in enumerate(served.plans) if plan.swap_in)
    begun = next(number for number, plan in enumerate(served.plans) if plan.sequences[-1].request_id == 2)
    assert back < begun


@pytest.mark.parametrize("mix", [None, MixSettings(0, 64, 1024, 8)])
def test_a_probe_does_not_wait_for_those_who_had_to_go(mix: MixSettings | None) -> None:
    served = machine(7, limits=replace(LIMITS, max_seq_len=28, mix=mix))
    for number, text in enumerate(TEXTS):
        served.add(number, Ask(text[:8], 16))
    while not served.scheduler.swapped:
        served.turn()
    ids = np.array([1], np.int32)
    served.scheduler.add(SequenceGroup(2, ids, SamplingParams(1), priority=PROBE, now=served.now))
    served.add(3, Ask(TEXTS[0][:4], 1))
    served.answers[2] = [[]]
    served.turn()
    assert len(served.answers[2][0]) == 1 and not served.answers[3][0] and served.scheduler.swapped


def test_who_hangs_up_while_swapped_out_leaves_nothing() -> None:
    served = machine(64)
    served.add(0, Ask(TEXTS[0][:9], 8, branches=2))
    served.turn()
    (group,) = served.scheduler.running
    served.scheduler.running.clear()
    served.scheduler._preempt(group)
    assert served.scheduler.abort(0, 1) and served.scheduler.has_work
    served.scheduler.check()
    assert served.scheduler.seconds_until_due(served.now) == 0.0
    assert served.scheduler.abort(0, 0) and not served.scheduler.has_work
    assert served.scheduler.swap.num_free == 40
    served.scheduler.check()


def test_the_check_sees_a_block_that_nobody_keeps() -> None:
    served = machine(64)
    served.scheduler.swap._free.pop()
    with pytest.raises(EngineBug):
        served.scheduler.check()
