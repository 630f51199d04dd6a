"""The torch filter of logits leaves what the host's draws from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.sampling_params import SamplingParams
from worker.device_draw import MAX_TOP_K, DeviceDraw
from worker.platforms.cuda_draw import keep_top_k_top_p
from worker.sampler import draw

VOCAB = 3000


@pytest.mark.parametrize("top_k", [1, 2, 40, MAX_TOP_K])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
def test_tokens_equal_the_hosts(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(0, 3, (64, VOCAB)).astype(np.float32))
    params = SamplingParams(max_tokens=1, temperature=0.8, top_k=top_k, top_p=top_p)
    uniforms = rng.random(64)
    got = DeviceDraw(keep_top_k_top_p)(logits, [params] * 64, uniforms)
    want = [draw(row.numpy().copy(), params, u) for row, u in zip(logits, uniforms.tolist(), strict=True)]
    assert got.tolist() == want


def test_rows_ask_for_different_things_and_equals_on_the_edge_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [5.0, 1.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    top_p, top_k = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([2, 4, 3], dtype=torch.int32)
    kept = keep_top_k_top_p(logits, top_p, top_k).isfinite()
    assert kept.tolist() == [[False, True, True, True], [True, False, False, False], [True] * 4]
