"""Log-probabilities for the samples that ask for them; the others cost nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executor import Sampled
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


def with_logprobs(logits: Tensor, samples: Seq[Sequence], tokens: NDArray[np.int32], num_eos: int) -> Sampled:
    """logits: [S, vocab] as the model gave them, so before temperature, penalties and truncation.

    `num_eos`: how many token ids end an answer; a beam needs a reserve of candidates for each.
    """
    wanted = [_wanted(seq.params, num_eos) for seq in samples]
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
    return Sampled(tokens, logprobs, top_ids, top_logprobs)


def _wanted(params: SamplingParams, num_eos: int) -> int:
    """How many of the most likely tokens a sample needs; -1: not even the chosen one's log-probability."""
    if params.beam_search:
        return params.branches * (1 + num_eos + len(params.stop_token_ids))
    return params.logprobs
