"""What is told of a step: outcomes, and candidates of beams, out of what was sampled."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from engine.beam import Candidate, History
from engine.executor import PromptScores, Sampled
from engine.outcome import FinishCode, Outcome
from engine.plan import StepPlan
from engine.sequence import SequenceGroup


def beam_candidates(plan: StepPlan, sampled: Sampled, indices: Seq[int], wanted: int) -> list[Candidate]:
    """How these samples of one group may go on; each is told with the `wanted` most likely tokens."""
    assert sampled.top_ids is not None and sampled.top_logprobs is not None
    candidates = []
    for index in indices:
        seq = plan.samples[index]
        ids, logprobs = sampled.top_ids[index].tolist(), sampled.top_logprobs[index].tolist()
        top = list(zip(ids, logprobs, strict=True))[: max(0, wanted)]
        scores = logprobs
        if index in sampled.beams:
            steered = sampled.beams[index]
            ids, scores, logprobs = (
                column.tolist() for column in (steered.ids, steered.scores, steered.logprobs)
            )
        for token, gain, logprob in zip(ids, scores, logprobs, strict=True):
            score = seq.cumulative_logprob + gain
            candidates.append(Candidate(score, seq, History(token, logprob, top)))
    return candidates


def wait_us(group: SequenceGroup) -> int:
    return int(group.waited * 1e6)


def told_step(plan: StepPlan) -> str:
    """Whose tokens a step made, as request.branch:count of its output; never which tokens."""
    made = " ".join(f"{seq.request_id}.{seq.branch}:{seq.num_output}" for seq in plan.samples)
    return f"{plan.kind.name.lower()} of {plan.num_rows} rows: {made}"


def prompt_outcomes(request_id: int, scores: PromptScores) -> Iterator[Outcome]:
    columns = (scores.tokens, scores.logprobs, scores.ranks, scores.other_ids, scores.other_logprobs)
    for token, logprob, rank, ids, logprobs in zip(*(c.tolist() for c in columns), strict=True):
        others = list(zip(ids, logprobs, strict=True))
        yield Outcome(request_id, 0, token, FinishCode.NONE, None, 0, logprob, others, rank)


def logprobs_of(sampled: Sampled, index: int, wanted: int) -> tuple[float, Seq[tuple[int, float]]]:
    """The chosen token's log-probability and the `wanted` most likely tokens; nothing when not asked for."""
    if wanted < 0 or sampled.logprobs is None:
        return 0.0, ()
    logprob = float(sampled.logprobs[index])
    if wanted == 0 or sampled.top_ids is None or sampled.top_logprobs is None:
        return logprob, ()
    ids, values = sampled.top_ids[index, :wanted].tolist(), sampled.top_logprobs[index, :wanted].tolist()
    return logprob, list(zip(ids, values, strict=True))
