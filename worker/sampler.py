"""Tokens out of logits: one maximum over the whole batch, and a row of its own only for who asked for more.

The sampled rows run in numpy, whose vectorised sort and partition of 152k floats took 0.4 and 0.1 ms against
30 and 0.3 ms for torch's sort and topk. Every row is computed by itself, so a request's tokens never depend
on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

Floats = NDArray[np.float32]

NO_TOKEN = -1  # the row's logits are no numbers

_PROBABLE = 1024  # tokens looked at first for top_p: nearly always enough, a tenth of the cost of all


class Sampler:
    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._scratch: Floats = np.empty((0, vocab_size), np.float32)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> NDArray[np.int32]:
        """logits: [R, vocab], not modified; row r belongs to sequences[r] -> the next token of each, [R].

        A row whose logits hold NaN or +Inf gets NO_TOKEN.
        """
        best, first_best = logits.max(dim=-1)  # 4x faster than argmax, and the first of equals like it
        tokens: NDArray[np.int32] = first_best.to("cpu", torch.int32).numpy()
        valid: NDArray[np.bool_] = torch.isfinite(best).cpu().numpy()  # the maximum carries any NaN along
        tokens[~valid] = NO_TOKEN
        rows = [
            row
            for row, sequence in enumerate(sequences)
            if valid[row] and not (sequence.params.greedy and not sequence.params.needs_penalties)
        ]
        if rows:
            own = [sequences[row] for row in rows]
            tokens[rows] = self._sample_rows(self._copy(logits, rows), own)
        return tokens

    def _copy(self, logits: Tensor, rows: list[int]) -> Floats:
        """The rows as float32 in a buffer that is reused: fresh megabytes are page-faulted in."""
        if len(rows) > len(self._scratch):
            self._scratch = np.empty((len(rows), self._vocab_size), np.float32)
        scratch = self._scratch[: len(rows)]
        torch.from_numpy(scratch).copy_(logits[rows])
        return scratch

    def _sample_rows(self, logits: Floats, sequences: list[Sequence]) -> list[int]:
        """logits: [n, vocab], used up."""
        uniforms = uniform(
            np.array([sequence.params.seed for sequence in sequences], np.uint64),
            np.array([sequence.num_output for sequence in sequences], np.uint64),
        )
        return [_sample_row(*row) for row in zip(logits, sequences, uniforms.tolist(), strict=True)]


def uniform(seed: NDArray[np.uint64], position: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) out of (seed, position) alone: neither preemption nor batch order matters."""
    bits = _mix(_mix(seed) + (position + np.uint64(1)) * _GOLDEN)
    result: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _sample_row(logits: Floats, sequence: Sequence, u: float) -> int:
    params = sequence.params
    if params.needs_penalties:
        penalize(logits, sequence)
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        return NO_TOKEN
    if params.greedy:
        return best
    # the largest becomes 0 first, so that no temperature, however small, can overflow
    logits -= logits[best]
    with np.errstate(over="ignore"):
        logits /= np.float32(max(params.temperature, _SMALLEST_TEMPERATURE))
    return draw(logits, params, u)


_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


def penalize(logits: Floats, sequence: Sequence) -> None:
    """Apply repetition, then frequency and presence penalty to one row, in place."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = sequence.tokens[: sequence.num_tokens]
        values = logits[seen]  # a repeated token is computed twice from the same value and written twice
        with np.errstate(over="ignore"):
            logits[seen] = np.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        tokens, counts = np.unique(sequence.output_ids, return_counts=True)
        logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty


def draw(scaled: Floats, params: SamplingParams, u: float) -> int:
    """scaled: [vocab] logits over temperature, largest 0. Inverts the distribution in vocabulary order."""
    top_k = params.top_k if 0 < params.top_k < len(scaled) else len(scaled)
    if top_k == len(scaled) and params.top_p >= 1.0:
        return _pick(np.exp(scaled), u)
    kept, threshold = _cut(scaled, top_k, params.top_p)
    candidates = np.flatnonzero(scaled >= threshold)
    surplus = len(candidates) - kept
    if surplus > 0:  # equals on the edge: the lowest ids stay
        ties = np.flatnonzero(scaled[candidates] == threshold)
        candidates = np.delete(candidates, ties[-surplus:])
    return int(candidates[_pick(np.exp(scaled[candidates]), u)])


def _pick(weights: Floats, u: float) -> int:
    total = np.cumsum(weights, dtype=np.float64)
    # strictly below the total, or rounding could step past the last token with any weight
    return int(np.searchsorted(total, min(u * total[-1], np.nextafter(total[-1], 0)), side="right"))


def _cut(scaled: Floats, top_k: int, top_p: float) -> tuple[int, np.float32]:
    """How many tokens top_k and then top_p leave (at least one), and the smallest scaled logit among them."""
    if top_k < len(scaled):
        top = _largest(scaled, top_k)
        if top_p >= 1.0:
            return top_k, top[-1]
        total = np.cumsum(np.exp(top), dtype=np.float64)
        wanted = top_p * total[-1]
    else:
        wanted = top_p * np.exp(scaled).sum(dtype=np.float64)
        for width in (min(_PROBABLE, len(scaled)), len(scaled)):
            top = _largest(scaled, width)
            total = np.cumsum(np.exp(top), dtype=np.float64)
            if total[-1] >= wanted:
                break
    kept = min(int(np.searchsorted(total, wanted)) + 1, len(top))
    return kept, top[kept - 1]


def _largest(values: Floats, count: int) -> Floats:
    """The `count` largest, falling."""
    top = (
        np.partition(values, len(values) - count)[len(values) - count :]
        if count < len(values)
        else values.copy()
    )
    top.sort()
    return top[::-1]
