"""Tokens out of logits: one maximum over the whole batch, and a row of its own only for who asked for more.

The sampled rows run in numpy, whose vectorised sort and partition of 152k floats took 0.4 and 0.1 ms against
30 and 0.3 ms for torch's sort and topk. Every row is computed by itself: from the same logits it draws the
same token whoever its batch mates are. How far the logits themselves are the same is the runner's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executor import NO_CONTINUATION, NO_TOKEN, NOT_YET
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.device_draw import DeviceDraw
from worker.grammar import Bits, GrammarBook, NoContinuation, NotYet

log = logging.getLogger("llm.sampler")

Floats = NDArray[np.float32]

_PROBABLE = 1024  # tokens looked at first for top_p: nearly always enough, a tenth of the cost of all


class Sampler:
    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Seq[int] = (),
        grammars: GrammarBook | None = None,
        device_draw: DeviceDraw | None = None,
    ) -> None:
        """`grammars`: needed for sequences with a grammar or a thinking budget.

        `device_draw`: for the rows that it takes; None: it is no gain where the logits are.
        """
        self._device_draw = device_draw
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._scratch: Floats = np.empty((0, vocab_size), np.float32)

    def expect(self, sequences: Seq[Sequence]) -> None:
        """Say what will be sampled next, so that masks are computed while the model runs."""
        bound = [sequence for sequence in sequences if _needs_mask(sequence)]
        if bound:
            assert self._grammars is not None
            self._grammars.expect(bound)

    def sample(
        self, logits: Tensor, sequences: Seq[Sequence], guessed_before: NDArray[np.int32] | None = None
    ) -> NDArray[np.int32]:
        """logits: [R, vocab], not modified; row r belongs to sequences[r] -> the next token of each, [R].

        `guessed_before`: [R] tokens that have been guessed between a sequence's newest token and this one.

        A row whose logits hold NaN or +Inf or that cannot be sampled gets NO_TOKEN, one whose grammar cannot
        go on NO_CONTINUATION, and one whose grammar does not know yet NOT_YET: it has to be asked for again.
        """
        best, first_best = logits.max(dim=-1)  # 4x faster than argmax, and the first of equals like it
        tokens: NDArray[np.int32] = first_best.to("cpu", torch.int32).numpy()
        valid: NDArray[np.bool_] = torch.isfinite(best).cpu().numpy()  # the maximum carries any NaN along
        tokens[~valid] = NO_TOKEN
        rows = [
            row
            for row, sequence in enumerate(sequences)
            if valid[row]
            and (sequence.params.edits_logits or not sequence.params.greedy)
            and not sequence.params.beam_search  # whose tokens are chosen among the candidates of all beams
        ]
        if rows:
            own = [sequences[row] for row in rows]
            bound = [sequence for sequence in own if _needs_mask(sequence)]
            if bound:
                assert self._grammars is not None
                self._grammars.collect(bound, alone=len(bound) == len(sequences))
            positions = np.array([sequence.num_known_output for sequence in own], np.uint64)
            if guessed_before is not None:
                positions += guessed_before[rows].astype(np.uint64)
            uniforms = uniform(np.array([sequence.seed for sequence in own], np.uint64), positions)
            if self._device_draw is not None:
                there = np.array([self._device_draw.takes(sequence.params) for sequence in own])
                rows = self._draw_there(logits, np.array(rows), own, uniforms, there, tokens)
                own = [sequence for sequence, taken in zip(own, there, strict=True) if not taken]
                uniforms = uniforms[~there]
            if rows:
                copies = self._copy(logits, rows)
                tokens[rows] = [
                    self._guarded_row(*row) for row in zip(copies, own, uniforms.tolist(), strict=True)
                ]
        return tokens

    def _draw_there(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        own: Seq[Sequence],
        uniforms: NDArray[np.float64],
        there: NDArray[np.bool_],
        tokens: NDArray[np.int32],
    ) -> list[int]:
        """Write the tokens of the rows that are drawn on the device -> the other rows."""
        assert self._device_draw is not None
        if there.any():
            wanted = [own[row].params for row in np.flatnonzero(there).tolist()]
            taken = rows[there]
            index = torch.from_numpy(taken).to(logits.device)
            tokens[taken] = self._device_draw(logits.index_select(0, index), wanted, uniforms[there])
        left: list[int] = rows[~there].tolist()
        return left

    def _copy(self, logits: Tensor, rows: list[int]) -> Floats:
        """The rows as float32 in a buffer that is reused: fresh megabytes are page-faulted in."""
        if len(rows) > len(self._scratch):
            self._scratch = np.empty((len(rows), self._vocab_size), np.float32)
        scratch = self._scratch[: len(rows)]
        torch.from_numpy(scratch).copy_(logits[rows])
        return scratch

    def _guarded_row(self, logits: Floats, sequence: Sequence, u: float) -> int:
        """A failure over what one request asked for ends that request; the others of the step go on."""
        try:
            return self._sample_row(logits, sequence, u)
        except Exception:
            log.exception("request %d cannot be sampled", sequence.request_id)
            return NO_TOKEN

    def _sample_row(self, logits: Floats, sequence: Sequence, u: float) -> int:
        """logits: [vocab], may be changed; u: in [0, 1)."""
        params = sequence.params
        legal = None
        if params.grammar or params.thinking_budget:
            assert self._grammars is not None
            try:
                allowed = self._grammars.legal(sequence)
            except NoContinuation:
                return NO_CONTINUATION
            except NotYet:
                return NOT_YET
            if isinstance(allowed, int):
                return allowed
            legal = allowed
        steer(logits, sequence, self._eos)
        if legal is not None:
            restrict(logits, legal)
        return int(logits.argmax()) if params.greedy else draw(logits, params, u)


def _needs_mask(sequence: Sequence) -> bool:
    return bool(sequence.params.grammar) and not sequence.params.beam_search


def steer(logits: Floats, sequence: Sequence, eos: Seq[int]) -> None:
    """Apply bias, penalties and min_tokens to one row, in place. `eos`: the tokens that end an answer."""
    params = sequence.params
    for token, bias in params.logit_bias:
        logits[token] += bias
    if params.needs_penalties:
        penalize(logits, sequence)
    if sequence.num_known_output < params.min_tokens:
        logits[[*eos, *params.stop_token_ids]] = -np.inf


def restrict(logits: Floats, legal: Bits) -> None:
    """Leave only the legal tokens of one row, in place. `legal`: [vocab], at least one.

    Where everything legal has been ruled out before, by min_tokens or by the model itself, all of it is
    alike: the format of the answer has the last word.
    """
    np.copyto(logits, -np.inf, where=~legal)
    if logits.max() == -np.inf:
        logits[legal] = 0.0


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


def penalize(logits: Floats, sequence: Sequence) -> None:
    """Apply repetition, then frequency and presence penalty to one row, in place.

    Finite logits stay finite however extreme the penalty, and -Inf stays -Inf.
    """
    params = sequence.params
    with np.errstate(over="ignore"):
        if params.repetition_penalty != 1.0:
            seen = sequence.tokens[: sequence.num_known]
            seen = seen[logits[seen] > -np.inf]
            values = _wide(logits[seen])  # a repeated token is computed and written twice, alike
            logits[seen] = _clipped(
                np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            )
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            tokens, counts = np.unique(sequence.output_ids, return_counts=True)
            finite = logits[tokens] > -np.inf
            tokens, counts = tokens[finite], counts[finite]
            # one after the other: two huge penalties of opposite sign would add up to NaN
            values = _clipped(_wide(logits[tokens]) - params.frequency_penalty * counts)
            logits[tokens] = _clipped(values - params.presence_penalty)


def _wide(values: Floats) -> NDArray[np.float64]:
    """float32 takes 1e-50 for 0 and 1e39 for Inf, and both are legal penalties."""
    return values.astype(np.float64)


def _clipped(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(values, _LIMITS.min, _LIMITS.max)


def draw(logits: Floats, params: SamplingParams, u: float) -> int:
    """The token at u in [0, 1) of the distribution function, in vocabulary order, of what the filters leave.

    Of equal logits on the edge of top_k or top_p the lowest ids stay.
    """
    best = logits.max()
    temperature = np.float32(min(max(params.temperature, float(_LIMITS.tiny)), float(_LIMITS.max)))

    def weights(values: Floats) -> Floats:
        """Probabilities but for a factor; the largest is 1, so nothing overflows at any temperature."""
        with np.errstate(over="ignore"):
            result: Floats = values - best
            result /= temperature
        np.exp(result, out=result)
        return result

    size = len(logits)
    top_k = min(params.top_k, size) or size
    if top_k == size and params.top_p >= 1.0:
        return _pick(_at_least(weights(logits), params.min_p), u)

    if top_k < size:
        top = _largest(logits, top_k)
        sums = _running_sums(weights(top))
        whole = sums[-1]
    else:
        whole = weights(logits).sum(dtype=np.float64)
        top = _largest(logits, min(_PROBABLE, size))
        sums = _running_sums(weights(top))
        if sums[-1] < params.top_p * whole:
            top = _largest(logits, size)
            sums = _running_sums(weights(top))
    kept = len(top)
    if params.top_p < 1.0:
        kept = min(kept, int(np.searchsorted(sums, params.top_p * whole)) + 1)

    threshold = top[kept - 1]
    candidates = np.flatnonzero(logits >= threshold)
    surplus = len(candidates) - kept
    if surplus > 0:
        ties = np.flatnonzero(logits[candidates] == threshold)
        candidates = np.delete(candidates, ties[-surplus:])
    return int(candidates[_pick(_at_least(weights(logits[candidates]), params.min_p), u)])


_LIMITS = np.finfo(np.float32)


def _at_least(weights: Floats, min_p: float) -> Floats:
    """Without the tokens less likely than min_p times the best, whose weight is 1."""
    if min_p:
        weights[weights < min_p] = 0.0
    return weights


def _pick(weights: Floats, u: float) -> int:
    sums = _running_sums(weights)
    # strictly below the total, or rounding could step past the last token with any weight
    return int(np.searchsorted(sums, min(u * sums[-1], np.nextafter(sums[-1], 0)), side="right"))


def _running_sums(weights: Floats) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = weights.astype(np.float64)  # cumsum(dtype=...) takes twice as long
    return np.cumsum(sums, out=sums)


def _largest(values: Floats, count: int) -> Floats:
    """The `count` largest, falling."""
    rest = len(values) - count
    top = np.partition(values, rest)[rest:] if rest else values.copy()
    top.sort()
    return top[::-1]
