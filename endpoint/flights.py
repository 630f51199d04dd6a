"""What is in flight: a request with all its prompts and branches, and what has come back of it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import ServerError
from engine.outcome import FinishCode
from engine.sampling_params import SamplingParams
from engine.wire.messages import ENDED

if TYPE_CHECKING:
    from endpoint.instance_choice import Place
    from endpoint.instance_link import InstanceLink


_TOKEN_BYTES = 240  # resident memory of 12,000 tokens that nobody read, each
_LOGPROB_BYTES = 120  # of each beside it: a pair with its two numbers


class Token(NamedTuple):
    """One row of a token record, stamped with the time it was read (monotonic seconds)."""

    branch: int  # the flight's number: those of its first part come first
    token_id: int
    finish: FinishCode
    batch_size: int
    queue_wait_us: int
    at: float
    logprob: float
    top: Sequence[tuple[int, float]]


class PromptRow(NamedTuple):
    """What the model thought of one token of a prompt, the first of which it cannot foresee."""

    token_id: int
    logprob: float
    rank: int  # 1: it was the most likely one
    others: Sequence[tuple[int, float]]  # the most likely ones without it, best first


@dataclass(slots=True, eq=False)
class Part:
    """One prompt of a request: to the engine it is a request of its own."""

    flight: Flight
    first: int  # the flight's number of its branch 0
    prompt: NDArray[np.int32]
    sampling: SamplingParams
    priority: int
    outputs: list[list[int]]  # of each branch, as far as it has come
    cache_salt: bytes = b""  # Submit.cache_salt
    ended: set[int] = field(default_factory=set)  # its branches without further tokens, by its own numbers
    prompt_rows: list[PromptRow] = field(default_factory=list)  # when asked for: all before the first token
    preemptions: int = 0  # in the instance it is in
    cached_tokens: int = 0  # of the prompt, found in the prefix cache by the instance that began it
    request_id: int = 0  # where it is now; another one in every instance
    link: InstanceLink | None = None  # None: it waits for an instance
    crashes: int = 0  # of instances it was in
    place: Place | None = None  # in the instance it is in, or on its way to
    digests: tuple[int, ...] | None = None  # of its prompt's blocks, for the choice of an instance; see there

    @property
    def num_tokens(self) -> int:
        """Of the prompt and what its answers have so far."""
        return len(self.prompt) + sum(map(len, self.outputs))

    def leave_place(self) -> None:
        if self.place is not None:
            self.place.leave()
            self.place = None

    @property
    def all_ended(self) -> bool:
        return len(self.ended) == self.flight.branches

    @property
    def over(self) -> bool:
        """Nobody waits for further tokens of it; those of the flight's other parts may still come."""
        return self.all_ended or self.flight.over

    @property
    def resumable(self) -> bool:
        """Whether another engine can go on with it: not in the middle of telling what a beam search found."""
        return not (self.sampling.beam_search and any(self.outputs))

    def progress(self) -> tuple[tuple[int, ...], NDArray[np.int32]]:
        """Submit.outputs, and the ids that lie on the ring: the prompt, then what each live branch has."""
        if not any(self.outputs):
            return (), self.prompt
        live = [[] if branch in self.ended else ids for branch, ids in enumerate(self.outputs)]
        counts = tuple(ENDED if branch in self.ended else len(ids) for branch, ids in enumerate(live))
        return counts, np.concatenate([self.prompt, *(np.array(ids, np.int32) for ids in live)])


@dataclass(slots=True, eq=False)
class Flight:
    """One request in the engine, from Submit to the last row of its last branch. Read by one task only."""

    branches: int  # of each part
    arrival: float  # monotonic seconds; when the HTTP request came
    submitted: float  # when it set out for the engine
    last_token: float  # when the last token came, or the request was submitted
    token_limit_s: float  # longest wait between two tokens
    parts: list[Part] = field(default_factory=list)
    preemptions: int = 0
    preempted_us: int = 0  # how long it waited to go on after them
    _cancelled: bool = False
    _arrived: deque[Token] = field(default_factory=deque)
    _failure: ServerError | None = None
    _waiter: asyncio.Future[None] | None = None

    def __str__(self) -> str:
        return ", ".join(str(part.request_id) for part in self.parts)

    @property
    def over(self) -> bool:
        """Nobody waits for further tokens."""
        return self._cancelled or self._failure is not None

    @property
    def cached_tokens(self) -> list[int]:
        """Of each prompt, found in a prefix cache; 0 until its first token has come."""
        return [part.cached_tokens for part in self.parts]

    @property
    def failure(self) -> ServerError | None:
        """What ended it, if it did not end well."""
        return self._failure

    def note_preemptions(self, part: Part, count: int, wait_us: int) -> None:
        """`count`: of this part so far, in its instance; another instance begins at 0 again."""
        if count > part.preemptions:
            self.preemptions += count - part.preemptions
            self.preempted_us += wait_us
        part.preemptions = count

    @property
    def unread_bytes(self) -> int:
        """About what the tokens take that nobody has read yet."""
        if not self._arrived:
            return 0
        return len(self._arrived) * (_TOKEN_BYTES + _LOGPROB_BYTES * len(self._arrived[-1].top))

    async def next(self) -> Token | None:
        """The next token, None when the request was cancelled. Raises the ServerError that ended it."""
        while not self._arrived:
            if self._cancelled:
                return None
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._arrived.popleft()

    def push(self, token: Token) -> None:
        self._arrived.append(token)
        self.last_token = token.at
        self._wake()

    def fail(self, error: ServerError) -> None:
        """End the request with an error, after what has already arrived."""
        if self._failure is None:
            self._failure = error
            self._wake()

    @classmethod
    def never_flown(cls, arrival: float) -> Flight:
        """Of a request that was cancelled before it reached the engine."""
        return cls(1, arrival, arrival, arrival, math.inf, _cancelled=True)

    def cancel(self) -> None:
        """End the request with what it has."""
        self._cancelled = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
