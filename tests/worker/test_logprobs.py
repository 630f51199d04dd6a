"""Candidates of steered beams: chosen by what they gain, told as the model has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.logprobs import with_logprobs

VOCAB = 50
EOS = [3, 4]


def beam(output: int = 0, **members: object) -> Sequence:
    params = SamplingParams(16, branches=2, beam_search=True, **members)  # type: ignore[arg-type]
    seq = Sequence(1, np.array([7, 8, 9], np.int32), params)
    for token in range(20, 20 + output):
        seq.append(token)
    return seq


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3)


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_edited_as_transformers_edits_them(seed: int) -> None:
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    given = logits(1, seed)
    seq = beam(output=2, repetition_penalty=1.7, min_tokens=5, logit_bias=((20, 2.5), (3, 9.0)))
    sampled = with_logprobs(given, [seq], np.array([0], np.int32), EOS)
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(20,): 2.5, (3,): 9.0}),
            RepetitionPenaltyLogitsProcessor(1.7),
            MinNewTokensLengthLogitsProcessor(3, 5, EOS),
        ]
    )
    ids = torch.from_numpy(seq.tokens[: seq.num_tokens].astype(np.int64))[None]
    own = given.log_softmax(-1)
    expected = processors(ids, own.clone())[0]
    steered = sampled.beams[0]
    order = expected.argsort(descending=True)[: 2 * 3]
    assert steered.ids.tolist() == order.tolist()
    assert steered.scores.tolist() == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert steered.logprobs.tolist() == pytest.approx(own[0][order].tolist(), abs=1e-5)
    assert not set(EOS) & set(steered.ids.tolist())
    assert sampled.top_logprobs is not None  # what is told stays the model's
    assert sampled.top_logprobs[0].tolist() == pytest.approx(
        own[0].sort(descending=True)[0][:6].tolist(), abs=1e-5
    )


def test_plain_beams_and_other_rows_are_left_alone() -> None:
    drawn = Sequence(2, np.array([7], np.int32), SamplingParams(16, repetition_penalty=1.5, logprobs=2))
    sampled = with_logprobs(
        logits(3), [beam(), drawn, beam(frequency_penalty=1.0)], np.array([0, 1, 2], np.int32), EOS
    )
    assert set(sampled.beams) == {2}


def test_a_beam_is_told_as_many_alternatives_as_it_asks_for() -> None:
    """However few candidates its search needs."""
    sampled = with_logprobs(logits(1), [beam(logprobs=20)], np.array([0], np.int32), EOS)
    assert sampled.top_ids is not None and sampled.top_ids.shape == (1, 20)


def test_more_is_not_asked_of_a_vocabulary_than_it_has() -> None:
    params = SamplingParams(16, branches=30, beam_search=True, min_tokens=1)
    seq = Sequence(1, np.array([7], np.int32), params)
    steered = with_logprobs(logits(1), [seq], np.array([0], np.int32), EOS).beams[0]
    assert sorted(steered.ids.tolist()) == [token for token in range(VOCAB) if token not in EOS]
    assert np.isfinite(steered.scores).all()
