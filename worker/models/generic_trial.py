"""Whether a model may be computed in pieces over paged keys: it is done once and compared with the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionBackend, AttentionSpec
from worker.attention.registry import make_attention
from worker.batch import Batch, make_batch
from worker.hf_config import DecoderConfig
from worker.kv_cache import KvCache, KvSpec

_BLOCK_SIZE = 4
_PIECES = (5, 4, 1, 1)  # tokens of each step: a prompt, a chunk behind it, and two that are decoded
_COMPANION = 3  # tokens of another text in each step


class Decoder(Protocol):
    def forward(self, batch: Batch, attention: AttentionBackend, cache: KvCache) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@torch.inference_mode()
def deviation_in_pieces(
    decoder: Decoder,
    whole: Callable[[Tensor], Tensor],
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """How far logits in pieces beside another text are from those of `whole`, int64 [n] -> [n, vocab].

    The median over the tokens that see earlier steps, relative to the length of the logits: one token that an
    expert more or less computes does not count, a mistake concerns nearly all of them.
    """
    text = np.random.default_rng(0).integers(0, config.vocab_size, sum(_PIECES)).astype(np.int32)
    want = whole(torch.from_numpy(text).to(device).long()).float()
    spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, dtype, window=config.window)
    attention = make_attention("reference", spec)
    blocks = 2 * -(-len(text) // _BLOCK_SIZE)
    kv = KvSpec(config.num_layers, _BLOCK_SIZE, config.num_kv_heads, config.head_dim, dtype)
    cache = KvCache(kv, blocks, device)
    sequence = _sequence(text[: _PIECES[0]], list(range(blocks // 2))[::-1])
    deviations: list[float] = []
    for size in _PIECES:
        if sequence.num_computed:
            for token in text[sequence.num_computed : sequence.num_computed + size].tolist():
                sequence.append(token)
        companion = _sequence(text[-_COMPANION:], list(range(blocks // 2, blocks)))
        plan = build_plan(StepKind.PREFILL, [companion, sequence], _BLOCK_SIZE)
        batch = make_batch(plan, device)
        attention.begin_step(batch, _BLOCK_SIZE)
        hidden = decoder.forward(batch, attention, cache)
        assert batch.last_tokens is not None  # the companion has several tokens
        last = int(batch.last_tokens[1]) + 1
        got = decoder.logits(hidden[last - size : last]).float()
        right = want[sequence.num_computed : sequence.num_computed + size]
        if sequence.num_computed:
            deviations += ((got - right).norm(dim=-1) / right.norm(dim=-1)).tolist()
        sequence.num_computed = sequence.num_tokens
    return float(np.median(deviations))


def _sequence(tokens: np.ndarray[tuple[int], np.dtype[np.int32]], blocks: list[int]) -> Sequence:
    sequence = Sequence(0, tokens.copy(), SamplingParams(max_tokens=sum(_PIECES)))
    sequence.block_table = blocks
    return sequence
