"""How many requests are served at once, who waits for a place, and when the next one is refused."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from dataclasses import dataclass, field

from endpoint.api_keys import ApiKey
from endpoint.drain_rate import DrainRate
from endpoint.quiet_log import QuietLog
from engine.errors import QuotaExceeded, ServiceUnavailable

log = logging.getLogger("server.admission")

LINE_FULL = "line_full"
WAITING_TOKENS = "waiting_tokens"
KEY_QUEUED = "key_queued"
KEY_TOKENS = "key_tokens"
REASONS = (LINE_FULL, WAITING_TOKENS, KEY_QUEUED, KEY_TOKENS)


@dataclass(slots=True, eq=False)
class _Share:
    """What the requests of one key have; where there are no keys, those of everybody."""

    key: ApiKey | None
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    @property
    def may_run(self) -> bool:
        """Whether the key's own limit leaves a place."""
        most = 0 if self.key is None else self.key.limits.max_running
        return not most or self.running < most


class Admission:
    """At most `limit` requests at once, twice as many waiting, the next one refused.

    A place that becomes free goes to the key with the fewest places among those that wait for one, in turns
    where they have as many, and within a key in the order of arrival. A full line belongs to everybody alike:
    for a key with fewer requests in it, the last comer of the key with the most gives way.

    `running`, `waiting`: requests. `waiting_tokens`: of prompts in the engine without a first token.
    `refused`: requests so far, by reason.
    """

    def __init__(self, limit: int, max_waiting_tokens: float = math.inf) -> None:
        self._limit = limit
        self._max_waiting_tokens = max_waiting_tokens
        self.running = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self.refused = dict.fromkeys(REASONS, 0)
        self._shares: dict[ApiKey | None, _Share] = {}  # whose turn is next comes first
        self._requests = DrainRate()
        self._tokens = DrainRate()
        self._quiet = QuietLog(log)

    @property
    def is_full(self) -> bool:
        """Whether the next one would be refused."""
        return self.running >= self._limit and self.waiting >= 2 * self._limit

    def set_limit(self, limit: int, max_waiting_tokens: float | None = None) -> None:
        """From now on; nobody who is in, or in line, is sent away. Also to be called when keys changed."""
        self._limit = limit
        if max_waiting_tokens is not None:
            self._max_waiting_tokens = max_waiting_tokens
        self._hand_over()

    def check_room(self, key: ApiKey | None = None) -> None:
        """Raise what `enter` would raise now: a refusal then costs no more than the head of a request."""
        if key is not None and (wait_s := key.wait_s()):
            raise self._over_quota(
                KEY_TOKENS, key, f"tokensPerMinute = {key.limits.tokens_per_minute} are used up", wait_s
            )
        if self.waiting_tokens >= self._max_waiting_tokens:
            raise self._tokens_waiting(0)
        share = self._shares.get(key)
        if self.running < self._limit and (share is None or share.may_run):
            return
        queued = 0 if share is None else len(share.waiting)
        if key is not None and 0 < key.limits.max_queued <= queued:
            wait_s = self._requests.retry_after_s(queued)
            raise self._over_quota(KEY_QUEUED, key, f"maxQueued = {queued} requests wait already", wait_s)
        if self.waiting >= 2 * self._limit and self._to_give_way(queued) is None:
            raise self._line_full()

    async def enter(self, key: ApiKey | None = None) -> Place:
        """Take a place, or stand in line for one. Raises ServiceUnavailable or QuotaExceeded."""
        self.check_room(key)
        share = self._shares.setdefault(key, _Share(key))
        if self.running < self._limit and share.may_run:
            self._take(share)
        else:
            if self.waiting >= 2 * self._limit:
                self._send_away_for(share)
            await self._turn_of(share)
        return Place(self, share)

    # -- the line -----------------------------------------------------------------------------------

    async def _turn_of(self, share: _Share) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        share.waiting.append(turn)
        self._change_line(+1)
        try:
            # not `await turn`: that would cancel it, and whether the place was handed over could not be told
            await asyncio.wait({turn})
        except asyncio.CancelledError:
            if not turn.done():
                share.waiting.remove(turn)
                self._change_line(-1)
                self._forget_if_idle(share)
            elif turn.exception() is None:
                self._give_back(share)
            raise
        turn.result()  # raises when it had to give way

    def _take(self, share: _Share) -> None:
        self.running += 1
        share.running += 1

    def _give_back(self, share: _Share) -> None:
        self._requests.advance(self.waiting, drained=1)
        self.running -= 1
        share.running -= 1
        self._hand_over()
        self._forget_if_idle(share)

    def _hand_over(self) -> None:
        while self.running < self._limit:
            able = [share for share in self._shares.values() if share.waiting and share.may_run]
            if not able:
                return
            share = min(able, key=lambda one: one.running)
            # among those with as many places its next turn is the last
            self._shares[share.key] = self._shares.pop(share.key)
            self._change_line(-1)
            self._take(share)
            share.waiting.popleft().set_result(None)

    def _to_give_way(self, queued: int) -> _Share | None:
        """Whose last comer makes room for a request of a key with `queued` others in line."""
        longest = max(self._shares.values(), key=lambda share: len(share.waiting))
        return longest if len(longest.waiting) > queued + 1 else None

    def _send_away_for(self, share: _Share) -> None:
        longest = self._to_give_way(len(share.waiting))
        assert longest is not None, "check_room has refused the request"
        self._change_line(-1)
        longest.waiting.pop().set_exception(self._line_full())

    def _change_line(self, by: int) -> None:
        self._requests.advance(self.waiting)
        self.waiting += by

    def _forget_if_idle(self, share: _Share) -> None:
        if not share.running and not share.waiting and self._shares.get(share.key) is share:
            del self._shares[share.key]

    # -- prompt tokens ------------------------------------------------------------------------------

    def _expect_first_token(self, tokens: int) -> None:
        # a prompt that alone is above the bound would never be served
        if self.waiting_tokens and self.waiting_tokens + tokens > self._max_waiting_tokens:
            raise self._tokens_waiting(tokens)
        self._tokens.advance(self.waiting_tokens)
        self.waiting_tokens += tokens

    def _drop_waiting(self, tokens: int, *, begun: bool) -> None:
        self._tokens.advance(self.waiting_tokens, drained=tokens if begun else 0)
        self.waiting_tokens -= tokens

    # -- refusals -----------------------------------------------------------------------------------

    def _line_full(self) -> ServiceUnavailable:
        self._count(LINE_FULL)
        return ServiceUnavailable(
            f"the server is full: {self._limit} requests are running (maxLinkNum) and {2 * self._limit} "
            "are waiting; try again later",
            self._requests.retry_after_s(self.waiting),
        )

    def _tokens_waiting(self, tokens: int) -> ServiceUnavailable:
        self._count(WAITING_TOKENS)
        more = f", and this request has {tokens}" if tokens else ""
        return ServiceUnavailable(
            f"the server is full: {self.waiting_tokens} prompt tokens wait for the model{more}; allowed are "
            f"{self._max_waiting_tokens} (maxWaitingTokens); try again later",
            self._tokens.retry_after_s(self.waiting_tokens),
        )

    def _over_quota(self, reason: str, key: ApiKey, what: str, wait_s: float) -> QuotaExceeded:
        self._count(reason)
        return QuotaExceeded(
            f"the limits of API key {key.name} are reached: {what}; wait, or ask for higher limits",
            math.ceil(wait_s),
        )

    def _count(self, reason: str) -> None:
        self.refused[reason] += 1
        self._quiet.warning("refused", "requests refused", reason)


class Place:
    """What one admitted request holds; `leave` gives all of it back."""

    __slots__ = ("_admission", "_share", "_waiting_tokens")

    def __init__(self, admission: Admission, share: _Share) -> None:
        self._admission = admission
        self._share = share
        self._waiting_tokens = 0

    def expect_first_token(self, tokens: int) -> None:
        """Its prompts, of `tokens` in all, go to the engine. Raises ServiceUnavailable when too many wait."""
        self._admission._expect_first_token(tokens)
        self._waiting_tokens += tokens
        self._spend(tokens)

    def prompt_begun(self, tokens: int) -> None:
        """The first token of a prompt of `tokens` has come."""
        self._admission._drop_waiting(tokens, begun=True)
        self._waiting_tokens -= tokens

    def token_generated(self) -> None:
        self._spend(1)

    def leave(self) -> None:
        """Give the place to the next in line. Once."""
        self._admission._drop_waiting(self._waiting_tokens, begun=False)
        self._waiting_tokens = 0
        self._admission._give_back(self._share)

    def _spend(self, tokens: int) -> None:
        if self._share.key is not None:
            self._share.key.spend(tokens)
