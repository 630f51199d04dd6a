"""Planning a step while the one before it is still being computed, and nobody knows what that one samples.

The step in flight is taken for one that gives every sequence a token and ends none. Its sequences count that
token in `num_tokens`, and the next step is planned as any other; only the token itself is missing from its
input, and is filled in when it is there. Who turns out to have ended has a row too many in the next step, and
what is sampled from that row is dropped.

Steps are computed in the order in which they are planned. So a sequence that has ended gives its blocks back
at once, although the step in flight may still write into them: who gets them writes later.

What does not go together with guessing waits for the result instead: taking blocks away from a request, so
that whoever gives way has all its tokens, and what is told of a prompt that comes in pieces.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.errors import EngineBug
from engine.executor import NO_TOKEN, NOT_YET, Sampled
from engine.outcome import FinishCode, Outcome
from engine.plan import StepPlan
from engine.requests import Turn
from engine.scheduler import Scheduler
from engine.sequence import GroupStatus, Sequence

MOST_IN_FLIGHT = 2  # one that is computed, one that follows it


@dataclass(eq=False, slots=True)
class Flight:
    """A step between its planning and its result; `fill_in` and `settle` belong to who computes it."""

    plan: StepPlan
    turn: Turn
    missing: list[tuple[int, Sequence]]  # places in `input_ids` of what the step before samples, and for whom
    void: set[Sequence] = field(default_factory=set)  # the step before has sampled nothing for them after all
    seconds: float = 0.0  # that computing it took

    def fill_in(self) -> None:
        """Complete the input, when the step before is settled."""
        input_ids, positions = self.plan.input_ids, self.plan.positions
        for place, seq in self.missing:
            position = positions[place]
            # a row without its token counts for nothing, and any id will do
            input_ids[place] = seq.tokens[position] if position < seq.num_known else 0

    def settle(self, sampled: Sampled) -> None:
        """Give the sequences their tokens, but for rows that read one that was not there."""
        contexts, rows = self.plan.context_len, self.plan.sample_rows
        read = (contexts if rows is None else contexts[rows]).tolist()
        for seq, length, token in zip(self.plan.samples, read, sampled.tokens.tolist(), strict=True):
            if token >= 0 and seq.num_known == length:
                seq.learn(token)

    def counts(self, seq: Sequence) -> bool:
        """Whether what is computed for it is of use to anybody."""
        return not seq.ended and seq not in self.void

    @property
    def num_wanted(self) -> int:
        """Rows that count."""
        return sum(map(self.counts, self.plan.sequences))


class Lookahead:
    """Plans up to two steps for a scheduler and applies their results, first in, first out.

    Requests have one sequence each, and no sequence guesses its own tokens.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        if scheduler.speculation is not None:
            raise EngineBug("steps cannot be planned ahead where their number of tokens is a guess")
        self._scheduler = scheduler
        self._flights: deque[Flight] = deque()
        self._expecting: set[Sequence] = set()  # who is to get a token from the first of them

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def first(self) -> Flight:
        """The one whose result comes next; there has to be one."""
        return self._flights[0]

    def plan(self, now: float) -> Flight | None:
        """The next step, to be computed behind the one in flight, of which there may be one.

        None: there is nothing to do, or it cannot be told before the next result.
        """
        if self._flights and not self._may_follow(self._flights[0], now):
            return None
        plan = self._scheduler.schedule(now)
        if plan is None:
            return None
        ends = (plan.query_start[1:] - 1).tolist()
        missing = [
            (end, seq)
            for end, seq, length in zip(ends, plan.sequences, plan.context_len.tolist(), strict=True)
            if seq in self._expecting and length == seq.num_tokens
        ]
        flight = Flight(plan, self._scheduler.turn, missing)
        self._flights.append(flight)
        if len(self._flights) == 1:
            self._take_off(flight)
        return flight

    def _may_follow(self, flight: Flight, now: float) -> bool:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        if any(seq.owes_prompt_scores for seq in flight.plan.sequences):
            return False
        if scheduler.overdue_first_token(now) is not None:
            return False
        wanted = sum(
            blocks.missing(seq)
            for group in scheduler.running
            if not group.prefilling and group not in scheduler.closing
            for seq in group.live
        )
        return wanted <= blocks.num_free

    def _take_off(self, flight: Flight) -> None:
        """Nothing is before it any more: from now on what it computes counts as computed."""
        plan, closing = flight.plan, self._scheduler.closing
        for seq, computed in zip(plan.sequences, plan.context_len.tolist(), strict=True):
            if flight.counts(seq):
                seq.num_computed = computed
        self._expecting = {seq for seq in plan.samples if flight.counts(seq)}
        for seq in self._expecting:
            seq.num_tokens += 1
        closing.clear()
        for group in flight.turn.groups:
            seq = group.sequences[0]
            if seq in self._expecting and self._scheduler.is_full(group, seq):
                closing.add(group)

    def commit(self, sampled: Sampled, now: float) -> list[Outcome]:
        """Apply the result of the first step in flight, which has been settled; end what is done."""
        flight = self._flights.popleft()
        following = self._flights[0] if self._flights else None
        plan, turn, results = flight.plan, flight.turn, self._scheduler.results
        self._scheduler.note_pace(turn, plan, flight.seconds)
        groups = {group.request_id: group for group in turn.groups}
        rows = [seq for seq in plan.sequences if flight.counts(seq)]
        outcomes = results.tell_prompts(sampled)
        for group in turn.groups:
            # planned before the last result was there, it has not waited since
            group.waited += max(0.0, turn.started - group.enqueued)
        for seq in sampled.failed:
            outcomes += results.fail(groups[seq.request_id])
        spoilt = set(sampled.failed)
        for index, (seq, token) in enumerate(zip(plan.samples, sampled.tokens.tolist(), strict=True)):
            if not flight.counts(seq):
                continue
            group = groups[seq.request_id]
            if token == NOT_YET:
                seq.num_tokens -= 1
                seq.num_computed = seq.num_tokens - 1
                if following is not None:
                    following.void.add(seq)
            else:
                outcomes.append(results.tell(group, seq, sampled, index))
            if token == NO_TOKEN:
                spoilt.add(seq)
            group.waited = 0.0
        for seq in rows:
            if seq not in spoilt:
                self._scheduler.blocks.publish(seq)
        for group in turn.groups:
            group.enqueued = now
        if any(outcome.finish is not FinishCode.NONE for outcome in outcomes):
            self._scheduler.sweep([group for group in turn.groups if group.status is GroupStatus.RUNNING])
        results.log(plan)
        self._expecting.clear()
        self._scheduler.closing.clear()
        if following is not None:
            self._take_off(following)
        return outcomes
