"""How many tokens of a prompt a step can take beside rows that decode, from what such steps have taken."""

from __future__ import annotations

import statistics
from collections import deque

# A mixed step may take so many times what the same rows take alone: streams are promised 2.5 for their gaps,
# and part of a gap is not the step.
_STRETCH = 2.2
_LEAST_TOKENS = 16  # fewer would not be worth the step; also taken while nothing has been measured
_ROW_MULTIPLE = 16  # of the tokens of a step: kernels are prepared for each number of rows
_MEMORY = 9  # steps whose median is believed: one that was disturbed counts for nothing


class ChunkPacer:
    """Measures steps and sizes the next chunk by them.

    A step costs what its decoding rows cost, which is measured by steps without a chunk and told apart by
    powers of two of rows, and for each token of a chunk an amount of its own.
    """

    def __init__(self) -> None:
        self._decode_s: dict[int, deque[float]] = {}  # by bits of the number of rows: seconds of a step
        self._token_s: deque[float] = deque(maxlen=_MEMORY)  # seconds of one token of a chunk
        self._last_tokens = _LEAST_TOKENS

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """A step of so many decoding rows and tokens of prompts has taken so long."""
        if not rows:
            return
        if not tokens:
            self._decode_s.setdefault(rows.bit_length(), deque(maxlen=_MEMORY)).append(seconds)
            return
        self._last_tokens = tokens
        decode = self._decode(rows)
        if decode is not None:
            self._token_s.append(max(0.0, seconds - decode) / tokens)

    def tokens(self, rows: int) -> int:
        """Tokens of prompts for a step in which so many rows decode; at least 1."""
        decode = self._decode(rows)
        if decode is None or not self._token_s:
            wanted = _LEAST_TOKENS
        else:
            # at most twice as many as just now: where a token costs next to nothing, noise decides
            most = 2 * max(self._last_tokens, _LEAST_TOKENS)
            cost = statistics.median(self._token_s)
            wanted = int(min(most, (_STRETCH - 1.0) * decode / cost)) if cost else most
        whole = (rows + wanted) // _ROW_MULTIPLE * _ROW_MULTIPLE
        return max(_LEAST_TOKENS, whole - rows)

    def _decode(self, rows: int) -> float | None:
        """Seconds of a step in which so many rows decode; the nearest known number stands in for others."""
        if not self._decode_s:
            return None
        bits = rows.bit_length()
        nearest = min(self._decode_s, key=lambda known: (abs(known - bits), known))
        return statistics.median(self._decode_s[nearest])
