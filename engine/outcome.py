"""What one engine step means for one request: the vocabulary of a token record."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from engine.errors import ServerError


class FinishCode(IntEnum):
    """How a sequence ended; travels as one byte."""

    NONE = 0
    EOS = 1
    STOP_TOKEN = 2
    LENGTH = 3
    ERROR = 4  # the record's `error` byte holds ServerError.number


class Outcome(NamedTuple):
    """One row of a token record."""

    request_id: int
    branch: int  # index among the sequences of the request
    token: int  # -1: no token, see `error`
    finish: FinishCode
    error: type[ServerError] | None
    queue_wait_us: int  # between the previous step of this request (or its arrival) and this one
    logprob: float = 0.0  # of the token, when asked for
    top: Sequence[tuple[int, float]] = ()  # the most likely tokens and their log-probabilities, best first
    # > 0: about a token of the prompt instead of a new one; its place among all tokens, 1 being the most
    # likely. `top` are then the others. These rows come before the first token, one per token but the first.
    rank: int = 0
    preemptions: int = 0  # of its request so far
    cached_tokens: int = 0  # of its request's prompt, found in the prefix cache
