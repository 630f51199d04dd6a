"""Log-probabilities for the samples that ask for them; the others cost nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executor import Continuations, Sampled
from engine.sequence import Sequence
from worker.sampler import Floats, steer


def with_logprobs(
    logits: Tensor, samples: Seq[Sequence], tokens: NDArray[np.int32], eos: Seq[int]
) -> Sampled:
    """logits: [S, vocab] as the model gave them, so before temperature, penalties and truncation.

    `eos`: the tokens that end an answer; a beam needs a reserve of candidates for each.
    """
    wanted = [seq.params.num_top(len(eos)) for seq in samples]
    rows = [row for row, count in enumerate(wanted) if count >= 0 and tokens[row] >= 0]
    if not rows:
        return Sampled(tokens)
    own = logits[rows].float()
    normaliser = own.logsumexp(dim=-1)
    chosen = own[torch.arange(len(rows)), torch.from_numpy(tokens[rows]).long()] - normaliser
    logprobs = np.zeros(len(samples), np.float32)
    logprobs[rows] = chosen.cpu().numpy()
    most = min(max(wanted[row] for row in rows), own.shape[-1])
    if most == 0:
        return Sampled(tokens, logprobs)
    values, ids = own.topk(most, dim=-1)
    top_ids = np.zeros((len(samples), most), np.int32)
    top_logprobs = np.zeros((len(samples), most), np.float32)
    top_ids[rows] = ids.to("cpu", torch.int32).numpy()
    top_logprobs[rows] = (values - normaliser[:, None]).cpu().numpy()
    steered = {
        row: _continuations((own[i] - normaliser[i]).cpu().numpy(), samples[row], wanted[row], eos)
        for i, row in enumerate(rows)
        if samples[row].params.beam_search and samples[row].params.edits_logits
    }
    return Sampled(tokens, logprobs, top_ids, top_logprobs, beams=steered)


def _continuations(logprobs: Floats, sequence: Sequence, count: int, eos: Seq[int]) -> Continuations:
    """The best `count` of a beam whose scores are steered; logprobs: [vocab].

    As in transformers it is the log-probabilities that are edited, not the logits, and what comes out is
    not normalised again.
    """
    scores = logprobs.copy()
    steer(scores, sequence, eos)
    best = np.argpartition(-scores, min(count, len(scores) - 1))[:count]
    best = best[np.argsort(-scores[best], kind="stable")]
    best = best[scores[best] > -np.inf]
    return Continuations(best.astype(np.int32), scores[best], logprobs[best])
