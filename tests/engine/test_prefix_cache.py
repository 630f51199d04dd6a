"""Prefix cache: whatever is shared, evicted, preempted or forked, answers are those of a plain schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import beam
from engine.block_manager import BlockManager
from engine.errors import EngineBug
from engine.executor import NO_TOKEN, NOT_YET, Sampled
from engine.plan import StepKind
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.engine.fake_model import BLOCK, TEXTS, Ask, Machine, asks, same
from tests.engine.fake_model import LIMITS as PLAIN

LIMITS = replace(PLAIN, prefix_cache=True)


def machine(num_blocks: int = 64, **limits: int) -> Machine:
    return Machine(replace(LIMITS, **limits), num_blocks)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.lists(asks(TEXTS), min_size=1, max_size=10), st.sampled_from((20, 26, 64)))
def test_answers_are_those_of_a_schedule_without_a_cache(requests: list[Ask], num_blocks: int) -> None:
    """20 blocks are too few for most of them at once: they preempt each other and evict what is kept."""
    plain = Machine(replace(LIMITS, prefix_cache=False), num_blocks=640)
    want = plain.serve(replace(ask, hangs_up=0) for ask in requests)
    assert not any(plain.cached.values())
    assert same(machine(num_blocks).serve(requests), want, requests)


def test_a_prompt_finds_the_whole_blocks_of_an_earlier_one() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:10]), Ask(TEXTS[0][:14], turn=9), Ask(TEXTS[0][:3], turn=9)])
    assert served.cached == {0: 0, 1: 8, 2: 0}
    prefills = [plan for plan in served.plans if plan.kind is StepKind.PREFILL]
    assert [plan.num_tokens for plan in prefills] == [10, 6 + 3]
    assert (served.scheduler.num_prefix_tokens, served.scheduler.num_prefix_hits) == (27, 8)


def test_a_prompt_that_is_known_as_a_whole_computes_its_last_block_again() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:12]), Ask(TEXTS[0][:12], turn=9), Ask(TEXTS[0][:13], turn=18)])
    assert served.cached == {0: 0, 1: 8, 2: 12}


def test_what_a_step_computes_is_found_only_after_it() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:12]), Ask(TEXTS[0][:12])])
    assert served.plans[0].num_tokens == 24 and served.cached == {0: 0, 1: 0}


def test_what_was_generated_is_found_by_the_next_turn_of_a_conversation() -> None:
    served = machine()
    (first,) = served.serve([Ask(TEXTS[0][:6], max_tokens=8)])[0]
    served.serve([Ask((*TEXTS[0][:6], *first, 50, 51))])
    assert served.cached[0] == (6 + len(first) - 1) // BLOCK * BLOCK  # its last token was never computed


@pytest.mark.parametrize("other", [{"salt": b"other key"}, {"reproducible": True}])
def test_nothing_is_shared_across_keys_or_arithmetics(other: dict[str, object]) -> None:
    ask = Ask(TEXTS[0][:20])
    served = machine()
    served.serve([ask, replace(ask, turn=9, **other), replace(ask, turn=18)])  # type: ignore[arg-type]
    assert served.cached == {0: 0, 1: 0, 2: 16}


def test_an_adapter_has_blocks_of_its_own() -> None:
    blocks = BlockManager(8, BLOCK, prefix_cache=True)
    ids = np.arange(9, dtype=np.int32)
    base, adapted = (Sequence(0, ids, SamplingParams(1, lora=name)) for name in ("", "poet"))
    blocks.grow(base)
    base.num_computed = 9
    blocks.publish(base)
    assert blocks.find(Sequence(1, ids, SamplingParams(1))) == base.block_table[:2]
    assert not blocks.find(adapted)


def test_two_processes_know_a_block_by_different_digests() -> None:
    first, second = (Sequence(0, np.arange(9, dtype=np.int32), SamplingParams(1)) for _ in range(2))
    BlockManager(8, BLOCK, prefix_cache=True).find(first)
    BlockManager(8, BLOCK, prefix_cache=True).find(second)
    assert len(first.block_digests) == 2 and not set(first.block_digests) & set(second.block_digests)


def test_a_prompt_whose_tokens_are_to_be_judged_is_computed() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:20])])
    group = Ask(TEXTS[0][:20]).group(9, served.now)
    for seq in group.sequences:
        seq.params = replace(seq.params, prompt_logprobs=0)
    served.scheduler.add(group)
    plan = served.scheduler.schedule(served.now + 1)
    assert plan is not None and plan.num_tokens == 20


def test_the_block_unused_for_longest_goes_first_and_ends_go_before_beginnings() -> None:
    served = machine(num_blocks=10, max_seq_len=40)
    served.serve([Ask(TEXTS[0][:12], 1), Ask(TEXTS[1][:12], 1, turn=9), Ask(TEXTS[0][:12], 1, turn=18)])
    # three blocks of each text are known; the first text was used last, and needs a fourth one now
    served.serve([Ask(TEXTS[0][:12] + tuple(range(200, 216)), 1)])  # takes the four blank ones
    assert served.cached[0] == 12
    served.serve([Ask(tuple(range(300, 307)), 1)])  # takes two: the end of the second text
    served.serve([Ask((*TEXTS[1][:12], 1), 1), Ask((*TEXTS[0][:12], 1), 1)])
    assert (served.cached[0], served.cached[1]) == (4, 12)


def test_a_preempted_request_finds_its_own_blocks() -> None:
    served = machine(num_blocks=20)
    served.add(1, Ask(TEXTS[0][:17], max_tokens=12, branches=2))
    for _ in range(6):
        served.turn()
    (group,) = served.scheduler.running
    served.scheduler.running.clear()
    served.scheduler._preempt(group)
    served.scheduler.check()
    computed = {seq.branch: seq.num_tokens for seq in group.live}
    plan = served.turn()
    assert plan is not None and plan.kind is StepKind.PREFILL
    # 21 or 22 of each branch's tokens lie in whole blocks: five of them, four of which are the prompt's
    assert plan.num_tokens == sum(tokens - 20 for tokens in computed.values())
    assert plan.block_table[0, :4].tolist() == plan.block_table[1, :4].tolist()
    served.serve([])
    want = Machine(replace(LIMITS, prefix_cache=False), 64).serve([Ask(TEXTS[0][:17], 12, branches=2)])
    assert served.answers[1] == want[0] and served.cached[1] == 0


def test_the_check_sees_a_block_that_is_idle_and_owned() -> None:
    served = machine()
    served.serve([Ask(TEXTS[0][:12])])
    seq = Sequence(0, np.array(TEXTS[0][:12], np.int32), SamplingParams(1))
    seq.block_table = served.blocks.find(seq)
    with pytest.raises(EngineBug):
        served.blocks.check([seq])


def test_a_token_that_is_computed_again_is_not_written_where_others_may_look() -> None:
    """The second branch waits for its first token in the prompt's last block, which the first has filled."""
    served = machine()
    served.scheduler.add(Ask(TEXTS[0][:8], 4, branches=2).group(0, served.now))
    plan = served.scheduler.schedule(1.0)
    assert plan is not None
    served.scheduler.commit(plan, Sampled(np.array([3, NOT_YET], np.int32)), 1.0)
    served.scheduler.abort(0, 0)
    plan = served.scheduler.schedule(2.0)
    assert plan is not None and plan.positions.tolist() == [7] and len(plan.copies) == 1
    assert not served.blocks.is_known(plan.copies[0][1])


def test_a_beam_that_takes_over_another_is_known_by_what_it_holds_then() -> None:
    blocks = BlockManager(16, BLOCK, prefix_cache=True)
    source, target = (Sequence(0, np.array(text[:9], np.int32), SamplingParams(4)) for text in TEXTS)
    for seq in (source, target):
        blocks.grow(seq)
        seq.num_computed = 9
        blocks.publish(seq)
    blocks.release(target)
    beam._fork(source, target, blocks)
    assert target.block_digests == source.block_digests
    assert blocks.find(target) == source.block_table[:2]


@pytest.mark.parametrize("spoilt", ["no numbers", "no memory"])
def test_what_could_not_be_computed_is_not_found(spoilt: str) -> None:
    served = machine()
    served.scheduler.add(Ask(TEXTS[0][:12], 4).group(0, served.now))
    plan = served.scheduler.schedule(1.0)
    assert plan is not None
    failed = plan.sequences if spoilt == "no memory" else ()
    token = 3 if spoilt == "no memory" else NO_TOKEN
    served.scheduler.commit(plan, Sampled(np.array([token], np.int32), failed=failed), 1.0)
    served.scheduler.check()
    assert not served.blocks.find(Ask(TEXTS[0][:12]).group(1, 0.0).sequences[0])
