"""What a step has sampled: applied to the sequences, and told to whoever asked for them."""

from __future__ import annotations

import logging

from engine.errors import EngineFailed, GrammarFailed
from engine.executor import NO_CONTINUATION, NO_TOKEN, NOT_YET, Sampled
from engine.logs import TOKENS
from engine.outcome import FinishCode, Outcome
from engine.plan import StepPlan
from engine.requests import Requests, Turn
from engine.sequence import Sequence, SequenceGroup
from engine.speculation import Speculation
from engine.told import beam_candidates, logprobs_of, prompt_outcomes, told_step, wait_us

token_log = logging.getLogger(TOKENS)


class StepResults:
    def __init__(self, requests: Requests, speculation: Speculation | None) -> None:
        self._requests = requests
        self._blocks = requests.blocks
        self._speculation = speculation

    def commit(self, turn: Turn, plan: StepPlan, sampled: Sampled, now: float) -> list[Outcome]:
        """Apply what was sampled for `plan.samples` and end what is done."""
        outcomes = self.tell_prompts(sampled)
        for group in turn.groups:
            group.waited += turn.started - group.enqueued
        for seq, computed in zip(plan.sequences, plan.context_len.tolist(), strict=True):
            seq.num_computed = computed
        for seq in sampled.failed:
            outcomes += self.fail(self._requests.by_id[seq.request_id])
        beams: dict[int, list[int]] = {}  # request -> its samples
        tokens = sampled.tokens.tolist()
        counts = None
        if plan.guessed is not None and self._speculation:
            counts = self._speculation.judge(plan, tokens)
        for index, seq in enumerate(plan.samples):
            if counts is not None and (seq.ended or not counts[index]):
                continue  # nothing follows an end, or a wrong guess
            group = self._requests.by_id[seq.request_id]
            if tokens[index] == NOT_YET:
                self._hold_back(group, seq)
            elif group.beam_search is not None and tokens[index] >= 0:
                beams.setdefault(seq.request_id, []).append(index)
            else:
                outcomes.append(self._commit_sample(group, seq, sampled, index))
        for request_id, indices in beams.items():
            outcomes += self._commit_beams(plan, sampled, indices, self._requests.by_id[request_id])
        if counts is not None:
            for seq in plan.sequences:
                seq.num_computed = seq.num_tokens - 1  # not what was computed behind a wrong guess
        for seq in plan.samples:
            self._requests.by_id[seq.request_id].waited = 0.0
        spoilt = {seq.request_id for seq in sampled.failed}
        spoilt |= {
            seq.request_id for seq, token in zip(plan.samples, tokens, strict=True) if token == NO_TOKEN
        }
        for seq in plan.sequences:  # not sooner: a sample that is held back takes a token back
            if seq.request_id not in spoilt:
                self._blocks.publish(seq)
        for group in turn.groups:
            group.enqueued = now
        if plan.sample_rows is not None or any(o.finish is not FinishCode.NONE for o in outcomes):
            self._requests.sweep(turn.groups)
        self.log(plan)
        return outcomes

    @staticmethod
    def log(plan: StepPlan) -> None:
        if token_log.isEnabledFor(logging.DEBUG):
            token_log.debug("%s", told_step(plan))

    def tell_prompts(self, sampled: Sampled) -> list[Outcome]:
        """What the model thought of the prompts of those that are still here."""
        outcomes: list[Outcome] = []
        for request_id, scores in sampled.prompts.items():
            group = self._requests.by_id.get(request_id)
            if group is None:
                continue
            outcomes += prompt_outcomes(request_id, scores)
            for seq in group.sequences:
                seq.num_told += len(scores.tokens)
        return outcomes

    def _commit_sample(self, group: SequenceGroup, seq: Sequence, sampled: Sampled, index: int) -> Outcome:
        token = int(sampled.tokens[index])
        if token >= 0:
            if not seq.block_table:  # a branch that starts from the prompt of branch 0
                self._blocks.share(group.sequences[0], seq)
                seq.num_computed = seq.num_tokens
            seq.append(token)
        return self.tell(group, seq, sampled, index)

    def tell(self, group: SequenceGroup, seq: Sequence, sampled: Sampled, index: int) -> Outcome:
        """Of a sample whose token, if it is one, is the newest of its sequence by now; ends what is done."""
        token, waited = int(sampled.tokens[index]), wait_us(group)
        if token < 0:
            seq.ended = True
            error = GrammarFailed if token == NO_CONTINUATION else EngineFailed
            return Outcome(seq.request_id, seq.branch, -1, FinishCode.ERROR, error, waited)
        finish = self._requests.finish_code(group, seq, token)
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
    def fail(group: SequenceGroup) -> list[Outcome]:
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
            self._blocks.share(group.sequences[0], seq)
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
        search.advance(group.sequences, candidates, self._blocks)
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
        if token in self._requests.eos and not group.params.ignore_eos:
            return FinishCode.EOS
        return FinishCode.STOP_TOKEN if token in group.stop_token_ids else FinishCode.LENGTH
