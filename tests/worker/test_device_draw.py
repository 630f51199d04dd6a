"""Drawing where the logits are against drawing on the host, from the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.sampling_params import SamplingParams
from tests.worker.test_sampler import SAMPLED, sequence
from worker.device_draw import DeviceDraw
from worker.sampler import NO_TOKEN, Sampler

VOCAB = 700
PLAIN = replace(SAMPLED, top_k=40)


def keep(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """The fused filter as its description has it: rising, from the least likely on."""
    values, order = logits.sort(dim=-1, stable=True)
    edge = values.gather(1, (logits.shape[1] - top_k.long())[:, None])
    values = values.masked_fill(values < edge, -torch.inf)
    out = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p[:, None]
    out[:, -1] = False
    return torch.empty_like(logits).scatter_(1, order, values.masked_fill(out, -torch.inf))


def samplers() -> tuple[Sampler, Sampler]:
    return Sampler(VOCAB, device_draw=DeviceDraw(keep)), Sampler(VOCAB)


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        replace(PLAIN, top_k=1),
        replace(PLAIN, temperature=0.3, top_p=0.7),
        replace(PLAIN, temperature=1e-30),
        replace(PLAIN, temperature=5.0, top_k=1024, top_p=0.95),
    ],
)
def test_the_token_is_that_of_the_host(params: SamplingParams) -> None:
    logits = torch.randn(300, VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    rows = [sequence(replace(params, seed=seed)) for seed in range(len(logits))]
    there, here = samplers()
    assert there.sample(logits, rows).tolist() == here.sample(logits, rows).tolist()


def test_rows_that_ask_for_more_stay_on_the_host() -> None:
    asking = [
        replace(PLAIN, top_k=0),
        replace(PLAIN, top_k=1025),
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, min_p=0.1),
        replace(PLAIN, reproducible=True),
        replace(PLAIN, repetition_penalty=1.1),
        replace(PLAIN, logit_bias=((3, 1.0),)),
    ]
    draw = DeviceDraw(keep)
    assert draw.takes(PLAIN)
    assert not any(draw.takes(params) for params in asking)


def test_rows_of_both_kinds_keep_their_places() -> None:
    kinds = (PLAIN, replace(PLAIN, temperature=0.0), replace(PLAIN, min_p=0.2), replace(PLAIN, top_p=0.5))
    rows = [sequence(replace(kinds[row % 4], seed=row)) for row in range(40)]
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    logits[8] = torch.nan
    there, here = samplers()
    drawn = there.sample(logits, rows)
    assert drawn.tolist() == here.sample(logits, rows).tolist()
    assert drawn[8] == NO_TOKEN


def test_the_last_number_below_one_draws_a_token_that_may_be_drawn() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = 10.0
    (token,) = DeviceDraw(keep)(logits, [replace(PLAIN, top_k=3)], np.array([np.nextafter(1.0, 0.0)]))
    assert token == 2
