"""Steps that are planned before the last result is there: the answers are those of one step at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineBug
from engine.executor import NO_TOKEN, NOT_YET, PromptScores, Sampled
from engine.lookahead import MOST_IN_FLIGHT, Flight, Lookahead
from engine.outcome import FinishCode, Outcome
from engine.plan import StepKind, StepPlan
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceGroup
from engine.settings import MixSettings, ScheduleSettings
from tests.engine.fake_model import EOS, LIMITS, TEXTS, VOCAB, Ask, FakeModel, Machine, asks, same

MIX = MixSettings(chunk_size=0, max_partial=3, long_threshold=20, max_long_partial=1)


class Moody(FakeModel):
    """Now and then a sample is not there yet, or is no token: by whose it is and where, not by when."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self._asked: set[tuple[int, int]] = set()

    def run(self, plan: StepPlan) -> Sampled:
        sampled = super().run(plan)
        rows = range(plan.num_rows) if plan.sample_rows is None else plan.sample_rows.tolist()
        for index, (row, seq) in enumerate(zip(rows, plan.samples, strict=True)):
            place = (seq.request_id, int(plan.context_len[row]))
            mood = hash(place) % 29
            if mood == 0:
                sampled.tokens[index] = NO_TOKEN
            elif mood < 6 and place not in self._asked:
                self._asked.add(place)
                sampled.tokens[index] = NOT_YET
        return sampled


class OneByOne(Machine):
    """Notes how each request ended."""

    def __init__(self, limits: ScheduleSettings, num_blocks: int, num_host_blocks: int, moody: bool) -> None:
        super().__init__(limits, num_blocks, num_host_blocks)
        if moody:
            self.model = Moody(num_blocks, limits.block_size, num_host_blocks)
        self.ends: dict[int, FinishCode] = {}

    def note(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.request_id not in self.ends, "a row after the end"
            if outcome.finish is not FinishCode.NONE:
                self.ends[outcome.request_id] = outcome.finish
            if outcome.finish is not FinishCode.ERROR:
                super().note([outcome])


class Overlapped(OneByOne):
    """Plans ahead. A step is computed at once when it is planned, or only when its result is asked for."""

    def __init__(
        self,
        limits: ScheduleSettings = LIMITS,
        num_blocks: int = 64,
        num_host_blocks: int = 0,
        moody: bool = False,
        haste: Iterable[bool] = (),
    ) -> None:
        super().__init__(limits, num_blocks, num_host_blocks, moody)
        self.lookahead = Lookahead(self.scheduler)
        self.most_in_flight = 0
        self._haste = list(haste) or [False]  # of the steps in turn, again and again
        self._planned = 0
        self._waiting: list[Flight] = []
        self._computed: list[Sampled] = []

    def turn(self) -> StepPlan | None:
        self.now += 0.01
        self.fill()
        return self.land() if self.lookahead.in_flight else None

    def fill(self) -> None:
        while self.lookahead.in_flight < MOST_IN_FLIGHT:
            following, preempted = bool(self.lookahead.in_flight), self.scheduler.num_preemptions
            flight = self.lookahead.plan(self.now)
            assert not self.scheduler.take_refused()
            assert not following or self.scheduler.num_preemptions == preempted
            if flight is None:
                break
            self.inspect(flight.plan)
            self._waiting.append(flight)
            if self._haste[self._planned % len(self._haste)]:
                self._compute()
            self._planned += 1
            self.blocks.check(seq for group in self.scheduler.running for seq in group.sequences)
        self.most_in_flight = max(self.most_in_flight, self.lookahead.in_flight)

    def land(self) -> StepPlan:
        plan = self.lookahead.first.plan
        if not self._computed:
            self._compute(1)
        self.note(self.lookahead.commit(self._computed.pop(0), self.now))
        self.scheduler.check()
        return plan

    def _compute(self, most: int = MOST_IN_FLIGHT) -> None:
        for flight in self._waiting[:most]:
            flight.fill_in()
            assert (flight.plan.input_ids >= 0).all()
            sampled = self.model.run(flight.plan)
            flight.settle(sampled)
            self._computed.append(sampled)
        del self._waiting[:most]

    def serve(self, asks: Iterable[Ask]) -> dict[int, list[list[int]]]:
        answers = super().serve(asks)
        while self.lookahead.in_flight:
            self.land()
        assert self.blocks.num_free == self.blocks.num_blocks
        return answers


def single(ask: Ask) -> Ask:
    return replace(ask, branches=1, beam_search=False, gone=None)


@settings(max_examples=400, deadline=None)
@given(
    requests=st.lists(asks(TEXTS).map(single), min_size=1, max_size=10),
    num_blocks=st.sampled_from((20, 26, 64)),
    num_host_blocks=st.sampled_from((0, 12)),
    mix=st.sampled_from((None, MIX, replace(MIX, chunk_size=5))),
    prefix_cache=st.booleans(),
    moody=st.booleans(),
    haste=st.lists(st.booleans(), max_size=7),
)
def test_answers_are_those_of_one_step_at_a_time(
    requests: list[Ask],
    num_blocks: int,
    num_host_blocks: int,
    mix: MixSettings | None,
    prefix_cache: bool,
    moody: bool,
    haste: list[bool],
) -> None:
    """Every request, to its last token and its end; `Machine` proves what holds of blocks after each step."""
    reference = OneByOne(replace(LIMITS, max_prefill_tokens=64), 640, 0, moody)
    want = reference.serve(replace(ask, hangs_up=0) for ask in requests)
    limits = replace(LIMITS, mix=mix, prefix_cache=prefix_cache, max_preempt_count=2)
    overlapped = Overlapped(limits, num_blocks, num_host_blocks, moody, haste)
    assert same(overlapped.serve(requests), want, requests)
    assert overlapped.most_in_flight <= MOST_IN_FLIGHT
    assert all(finish is reference.ends[number] for number, finish in overlapped.ends.items())
    stayed = {number for number, ask in enumerate(requests) if not ask.hangs_up}
    assert stayed <= overlapped.ends.keys()


def test_the_next_step_is_planned_without_the_token_that_it_reads() -> None:
    served = Overlapped()
    served.add(0, Ask(TEXTS[0][:6], 4))
    served.now = 1.0
    served.fill()
    assert [plan.kind for plan in served.plans] == [StepKind.PREFILL, StepKind.DECODE]
    assert served.answers == {0: [[]]}, "nothing is known yet"
    following = served.plans[1]
    assert following.positions.tolist() == [6] and following.context_len.tolist() == [7]
    served.land()
    (token,) = served.answers[0][0]
    served.land()
    assert following.input_ids.tolist() == [token]


def test_who_has_had_all_tokens_is_not_computed_once_more() -> None:
    served = Overlapped()
    served.serve([Ask(TEXTS[0][:6], 3)])
    assert [plan.num_rows for plan in served.plans] == [1, 1, 1] and served.ends == {0: FinishCode.LENGTH}


@pytest.mark.parametrize("haste", [False, True])
def test_what_is_computed_behind_an_end_is_never_told(haste: bool) -> None:
    """The first token ends the one answer; its row is in the next step already, beside the other's."""
    served = Overlapped(haste=[haste])
    wanted = (SamplingParams(9, stop_token_ids=tuple(range(VOCAB))), SamplingParams(9, ignore_eos=True))
    groups = [SequenceGroup(id, np.array([1, 2, 3], np.int32), params) for id, params in enumerate(wanted)]
    for group in groups:
        served.answers[group.request_id] = [[]]
        served.scheduler.add(group)
    served.turn()
    assert [seq.request_id for seq in served.plans[1].sequences] == [0, 1]
    assert served.ends == {0: FinishCode.STOP_TOKEN} and not groups[0].sequences[0].block_table
    assert served.lookahead.first.num_wanted == 1
    while served.scheduler.has_work:
        served.turn()
    assert [len(served.answers[number][0]) for number in (0, 1)] == [1, 9]
    assert all(plan.num_rows == 1 for plan in served.plans[2:])


def test_a_client_may_go_while_its_step_is_in_flight() -> None:
    served = Overlapped()
    served.add(0, Ask(TEXTS[0][:9], 20))
    served.turn()
    served.fill()
    told = len(served.answers[0][0])
    assert served.lookahead.in_flight == 2 and served.scheduler.abort(0)
    assert served.blocks.num_free == 64
    served.add(1, Ask(TEXTS[0][:9], 4))
    served.serve([])
    assert len(served.answers[0][0]) == told and 0 not in served.ends
    assert served.answers[1] == Machine(LIMITS, 64).serve([Ask(TEXTS[0][:9], 4)])[0]


def test_nobody_gives_way_before_the_result_is_there() -> None:
    """Two requests grow from two blocks each to six; there are seven."""
    served = Overlapped(replace(LIMITS, max_seq_len=28), 7)
    asked = [Ask(TEXTS[0][:8], 16), Ask(TEXTS[1][:8], 16)]
    answers = served.serve(asked)
    assert served.scheduler.num_preemptions > 0
    assert answers == Machine(replace(LIMITS, max_seq_len=28), 64).serve(asked)


def test_a_newcomer_that_has_waited_too_long_is_helped_between_results() -> None:
    """Those that run have room to grow until they end, so nothing else would stop planning ahead."""
    served = Overlapped(replace(LIMITS, max_first_token_wait_ms=50), 15)
    served.add(0, Ask(TEXTS[0][:14], 12))
    served.add(1, Ask(TEXTS[1][:14], 12))
    served.turn()
    served.add(2, Ask(TEXTS[0][:30], 2))
    served.serve([])
    first = next(index for index, plan in enumerate(served.plans) if 2 in ids(plan))
    last = max(index for index, plan in enumerate(served.plans) if 1 in ids(plan))
    assert served.scheduler.num_preemptions == 1 and first < last


def test_nobody_finds_what_could_not_be_computed() -> None:
    served = Overlapped(replace(LIMITS, prefix_cache=True))
    served.add(0, Ask(TEXTS[0][:9], 4))
    served.now = 1.0
    served.fill()
    flight = served.lookahead.first
    sampled = replace(served.model.run(flight.plan), tokens=np.array([NO_TOKEN], np.int32))
    flight.settle(sampled)
    served.note(served.lookahead.commit(sampled, 1.0))
    assert served.ends == {0: FinishCode.ERROR}
    served.lookahead.first.fill_in()
    served.lookahead.commit(served.model.run(served.lookahead.first.plan), 1.0)
    served._waiting.clear()
    served.add(1, Ask(TEXTS[0][:9], 4))
    served.serve([])
    assert served.cached == {1: 0}


def ids(plan: StepPlan) -> set[int]:
    return {seq.request_id for seq in plan.sequences}


def test_the_next_step_waits_while_a_prompt_is_judged() -> None:
    served = Overlapped()
    params = SamplingParams(4, prompt_logprobs=0)
    served.answers[0] = [[]]
    served.scheduler.add(SequenceGroup(0, np.array([1, 2, 3], np.int32), params))
    served.now = 1.0
    served.fill()
    assert served.lookahead.in_flight == 1
    column = np.zeros(2, np.float32)
    scores = PromptScores(np.array([2, 3], np.int32), column, np.ones(2, np.int32), *[np.zeros((2, 0))] * 2)
    flight = served.lookahead.first
    sampled = replace(served.model.run(flight.plan), prompts={0: scores})
    flight.settle(sampled)
    outcomes = served.lookahead.commit(sampled, 1.0)
    assert [outcome.rank for outcome in outcomes] == [1, 1, 0]
    served._waiting.clear()
    served.fill()
    assert served.lookahead.in_flight == 2, "it owes nothing any more"


def test_tokens_that_are_guessed_cannot_be_planned_behind() -> None:
    guessing = Machine(replace(LIMITS, guess_length=4), 64)
    with pytest.raises(EngineBug):
        Lookahead(guessing.scheduler)


def test_EOS_is_among_what_the_model_says() -> None:
    """Or the random schedules above would not meet an end that nobody expects."""
    served = Overlapped()
    served.serve([Ask(TEXTS[0][:length], 12, ignore_eos=False) for length in range(1, 9)])
    assert FinishCode.EOS in served.ends.values()
    assert EOS in {token for (told,) in served.answers.values() for token in told}
