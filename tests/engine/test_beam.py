"""Beam search in the scheduler: random distributions and pools, an exhaustive search, the invariants.

The words themselves are compared with transformers on the shipped model in tests/e2e/test_choices.py.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from engine.block_manager import BlockManager
from engine.executor import Sampled
from engine.outcome import FinishCode, Outcome
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceGroup
from engine.settings import ScheduleSettings

VOCABULARY = 6
EOS = 0
LIMITS = ScheduleSettings(
    block_size=2,
    max_prefill_batch_size=8,
    max_prefill_tokens=64,
    max_batch_size=16,
    max_iter_times=32,
    max_queue_delay_us=500,
    max_first_token_wait_ms=2500,
    max_n=8,
    max_seq_len=40,
    max_input_len=32,
    truncation="off",
)


def model(seed: int, tokens: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of the next token: any function of the whole context will do."""
    logits = np.random.default_rng([seed, *tokens]).normal(size=VOCABULARY) * 2
    result: np.ndarray = logits - np.log(np.exp(logits).sum())
    return result


def sample(seed: int, samples: list[Sequence]) -> Sampled:
    rows = [model(seed, tuple(seq.tokens[: seq.num_tokens].tolist())) for seq in samples]
    order = np.array([np.argsort(-row, kind="stable") for row in rows], np.int32)
    values = np.array([row[ids] for row, ids in zip(rows, order, strict=True)], np.float32)
    return Sampled(order[:, 0].copy(), values[:, 0].copy(), order, values)


def run(seed: int, scheduler: Scheduler) -> list[Outcome]:
    outcomes: list[Outcome] = []
    now = 1.0
    for _ in range(1000):
        if not scheduler.has_work:
            return outcomes
        plan = scheduler.schedule(now)
        assert not scheduler.take_refused()
        if plan is not None:
            outcomes += scheduler.commit(plan, sample(seed, list(plan.samples)), now)
        scheduler.check()
        now += 0.01
    raise AssertionError("the search does not end")


def answers(outcomes: list[Outcome], request_id: int) -> list[list[int]]:
    own = [o for o in outcomes if o.request_id == request_id]
    branches = [[o.token for o in rows] for _, rows in itertools.groupby(own, key=lambda o: o.branch)]
    ends = [o for o in own if o.finish is not FinishCode.NONE]
    assert [o.branch for o in ends] == list(range(len(branches)))  # each ends once, best first
    return branches


def beam(request_id: int, prompt: list[int], width: int, max_tokens: int) -> SequenceGroup:
    params = SamplingParams(max_tokens, branches=width, beam_search=True)
    return SequenceGroup(request_id, np.array(prompt, np.int32), params)


@pytest.mark.parametrize("seed", range(30))
def test_a_beam_as_wide_as_everything_finds_the_best_answers(seed: int) -> None:
    """Two tokens at most: with width = vocabulary nothing can be lost, so the search must be exhaustive."""
    scheduler = Scheduler(LIMITS, BlockManager(64, 2), [EOS])
    scheduler.add(beam(1, [1, 2, 3], VOCABULARY, 2))
    found = answers(run(seed, scheduler), 1)
    first = model(seed, (1, 2, 3))
    scores = {(EOS,): first[EOS]}
    for a in range(1, VOCABULARY):
        second = model(seed, (1, 2, 3, a))
        for b in range(VOCABULARY):
            scores[a, b] = (first[a] + second[b]) / 2
    best = sorted(scores, key=lambda answer: -scores[answer])
    assert tuple(found[0]) == best[0]


@pytest.mark.parametrize("seed", range(60))
def test_a_small_pool_preempts_and_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        (
            i,
            [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 9))],
            rng.randint(1, 4),
            rng.randint(1, 9),
        )
        for i in range(6)
    ]
    results = []
    for num_blocks in (200, 24):
        limits = replace(LIMITS, max_batch_size=rng.choice([4, 16]))
        scheduler = Scheduler(limits, BlockManager(num_blocks, 2), [EOS])
        for request in requests:
            scheduler.add(beam(*request))
        outcomes = run(seed, scheduler)
        assert scheduler.blocks.num_free == num_blocks
        results.append([answers(outcomes, request[0]) for request in requests])
    assert results[0] == results[1]


@pytest.mark.parametrize("seed", range(5))
def test_beams_that_could_not_come_back_are_not_sent_away(seed: int) -> None:
    """Running they share more than their prompt; computed again each would need blocks of its own."""
    scheduler = Scheduler(LIMITS, BlockManager(20, 2), [EOS])
    ids = np.array([1] * 6, np.int32)
    scheduler.add(SequenceGroup(1, ids, SamplingParams(30, ignore_eos=True), now=0.0))
    group = beam(2, [1, 2, 3], 4, 12)
    group.arrival = 0.1  # later than the other, so it would be the one to give way
    scheduler.add(group)
    outcomes = run(seed, scheduler)
    assert scheduler.num_preemptions
    assert FinishCode.ERROR not in {outcome.finish for outcome in outcomes}
    assert len(answers(outcomes, 2)) == 4


def test_a_beam_whose_logits_are_no_numbers_ends_with_an_error() -> None:
    scheduler = Scheduler(LIMITS, BlockManager(64, 2), [EOS])
    scheduler.add(beam(1, [1, 2, 3], 2, 4))
    plan = scheduler.schedule(1.0)
    assert plan is not None
    bad = sample(0, list(plan.samples))
    outcomes = scheduler.commit(plan, replace(bad, tokens=np.array([-1, -1], np.int32)), 1.0)
    assert [o.finish for o in outcomes] == [FinishCode.ERROR] * 2
    assert not scheduler.has_work and scheduler.blocks.num_free == 64
