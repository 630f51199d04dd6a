"""From a checked request to a stream of text: admission, tokenizing, limits, timeouts, abort."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from endpoint.detokenizer import IncrementalDetokenizer
from endpoint.engine_client import EngineClient, Flight, Token
from endpoint.metrics import Metrics
from endpoint.protocols.base import (
    ChatPrompt,
    Completion,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.token_count import CountRequest, count_tokens
from endpoint.tokenizer import TokenizerPool
from endpoint.validation import check_token_count
from engine.errors import GenerationRefused, NotFound, RequestTimeout, ServerError, ServiceUnavailable
from engine.outcome import FinishCode
from engine.settings import EndpointSettings, ModelSettings, ScheduleSettings

_FINISH = {
    FinishCode.EOS: FinishReason.EOS,
    FinishCode.STOP_TOKEN: FinishReason.STOP,
    FinishCode.LENGTH: FinishReason.LENGTH,
}
_SWEEP_S = 0.1  # how often deadlines are looked at: one timer for all requests instead of one per token
_INLINE_CHARS = 2000  # longer texts are counted beside the event loop
_STALL_S = 60.0  # for writing the end of an answer whose time is up
_LAST_FRAMES_S = 1.0  # for writing error events when the service stops
_TIMEOUT = "Engine callback timeout"  # clients match on this beginning


class Admission:
    """At most `limit` requests at once, twice as many waiting in order, the next one refused."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Take a place, or stand in line for one. Raises ServiceUnavailable when the line is full."""
        if self._running < self._limit:
            self._running += 1
            return
        if len(self._waiting) >= 2 * self._limit:
            raise ServiceUnavailable(
                f"the server is full: {self._limit} requests are running (maxLinkNum) and {2 * self._limit} "
                "are waiting; try again later",
                retry_after_s=1,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            # not `await turn`: that would cancel it, and whether the place was handed over could not be told
            await asyncio.wait({turn})
        except asyncio.CancelledError:
            if turn.done():
                self.leave()
            else:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Give the place to the next in line."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._running -= 1


@dataclass(slots=True, eq=False)
class _Ticket:
    """One request from its arrival to its last byte."""

    task: asyncio.Task[Any]
    arrival: float  # monotonic seconds
    client_id: str | None  # the client's own name for it
    flight: Flight | None = None  # once it is in the engine
    verdict: ServerError | None = None  # why its task was cancelled by us

    def end(self, verdict: ServerError) -> None:
        """End it with an error, wherever it is."""
        if self.flight is not None:
            self.flight.fail(verdict)
        elif self.verdict is None:
            self.verdict = verdict
            self.task.cancel()


class _Choice:
    """The text of one branch as it grows."""

    def __init__(
        self, index: int, detokenizer: IncrementalDetokenizer, arrival: float, logprobs: bool
    ) -> None:
        self.index = index
        self._logprobs = logprobs
        self._detokenizer = detokenizer
        self._pieces: list[str] = []
        self._num_tokens = 0
        self._previous = arrival
        self.finished = False

    def step(
        self, token: Token, include_stop: bool, whole: bool, cancelled: bool, words: TokenizerPool
    ) -> TokenStep:
        """`whole`: the full text is wanted although this is not the last step; `cancelled`: it is."""
        finish = _FINISH.get(token.finish) or (FinishReason.CANCELLED if cancelled else None)
        stopped = token.finish is FinishCode.STOP_TOKEN
        if stopped and not include_stop:
            delta = self._detokenizer.finish()
        else:
            delta = self._detokenizer.push(token.token_id, last=finish is not None)
        stop_reason: str | int | None = token.token_id if stopped else None
        if delta.stop_hit is not None:
            finish, stop_reason = FinishReason.STOP, delta.stop_hit
        self._pieces.append(delta.text)
        latency_ms, self._previous = (token.at - self._previous) * 1e3, token.at
        position, self._num_tokens = self._num_tokens, self._num_tokens + 1
        self.finished = finish is not None
        return TokenStep(
            token_id=token.token_id,
            text=delta.text,
            full_text="".join(self._pieces) if whole or self.finished else "",
            index=position,
            latency_ms=latency_ms,
            batch_size=token.batch_size,
            queue_wait_us=token.queue_wait_us,
            finish=finish,
            stop_reason=stop_reason,
            choice=self.index,
            logprob=_named(words, token.token_id, token.logprob) if self._logprobs else None,
            top_logprobs=tuple(_named(words, *entry) for entry in token.top),
        )


def _named(words: TokenizerPool, token_id: int, logprob: float) -> TokenLogprob:
    return TokenLogprob(token_id, words.decode([token_id], skip_special_tokens=False), logprob)


class GenerationStream:
    """The text steps of one request, of all its choices as they come. Iterate it once, or `collect` it."""

    def __init__(
        self,
        engine: EngineClient,
        flight: Flight,
        tokenizer: TokenizerPool,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        context: ReplyContext,
        metrics: Metrics,
    ) -> None:
        self.context = context
        self._engine = engine
        self._flight = flight
        self._tokenizer = tokenizer
        self._request = request
        self._metrics = metrics
        self.complete = False  # every choice has ended well
        self._choices = [self._choice(index, prompt_ids) for index in range(request.sampling.branches)]

    def _choice(self, index: int, prompt_ids: Sequence[int]) -> _Choice:
        request = self._request
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            prompt_ids,
            skip_special_tokens=request.skip_special_tokens,
            stop=request.stop,
            include_stop=request.include_stop,
        )
        return _Choice(index, detokenizer, self._flight.arrival, request.sampling.logprobs >= 0)

    async def __aiter__(self) -> AsyncIterator[TokenStep]:
        whole, left, generated = self.context.full_text_frames, len(self._choices), 0
        while left:
            token = await self._flight.next()
            choice = self._choices[token.branch]
            if choice.finished:
                continue  # computed before the engine heard of the stop string
            step = choice.step(
                token, self._request.include_stop, whole, self._flight.cancelled, self._tokenizer
            )
            generated += 1
            if generated == 1:
                self._metrics.first_token(token.at - self._flight.submitted)
            else:
                self._metrics.next_token(step.latency_ms / 1e3)
            if choice.finished:
                left -= 1
                self._engine.end_branch(self._flight, token.branch)
            yield step
        self._metrics.finished(generated)
        self.complete = True

    async def collect(self) -> list[Completion]:
        """All choices: as generated, or the most likely first when more were generated than asked for."""
        steps: list[list[TokenStep]] = [[] for _ in self._choices]
        async for step in self:
            steps[step.choice].append(step)
        completions = [_completion(of_choice) for of_choice in steps]
        if self._request.n < len(completions):
            completions.sort(key=lambda completion: -sum(token.logprob for token in completion.logprobs))
        return completions


def _completion(steps: Sequence[TokenStep]) -> Completion:
    last = steps[-1]
    assert last.finish is not None
    return Completion(
        text=last.full_text,
        token_ids=[step.token_id for step in steps],
        finish=last.finish,
        stop_reason=last.stop_reason,
        latencies_ms=[step.latency_ms for step in steps],
        batch_sizes=[step.batch_size for step in steps],
        queue_waits_us=[step.queue_wait_us for step in steps],
        logprobs=[step.logprob for step in steps if step.logprob is not None],
        top_logprobs=[step.top_logprobs for step in steps],
    )


class GenerationService:
    """Serves checked requests, whatever dialect they came in. One per endpoint process."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: TokenizerPool,
        endpoint: EndpointSettings,
        schedule: ScheduleSettings,
        model: ModelSettings,
        info: ModelInfo,
        metrics: Metrics,
    ) -> None:
        self.info = info
        self._metrics = metrics
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = endpoint
        self._truncation = schedule.truncation
        self._ignore_eos = model.ignore_eos
        self._admission = Admission(endpoint.max_link_num)
        self._numbers = itertools.count(1)
        self._stopping = False
        self._tickets: set[_Ticket] = set()

    @asynccontextmanager
    async def open(self, request: GenerationRequest) -> AsyncIterator[GenerationStream]:
        """Admit, tokenize and submit; leaving the block, by any door, ends what still runs.

        Raises ServiceUnavailable, GenerationRefused, InvalidRequest or RequestTimeout.
        """
        task = asyncio.current_task()
        assert task is not None
        ticket = _Ticket(task, time.monotonic(), request.client_id)
        self._tickets.add(ticket)
        admitted = False
        try:
            try:
                self._check_accepting()
                await self._admission.enter()
                admitted = True
                self._check_accepting()  # the wait may have been long
                prompt_ids = self._fit(await self._encode(request), request.keep_last)
                ticket.flight = await self._submit(request, prompt_ids, ticket.arrival)
            except asyncio.CancelledError:
                if ticket.verdict is not None:
                    raise ticket.verdict from None
                raise
            yield self._stream(request, ticket.flight, prompt_ids)
        finally:
            self._tickets.discard(ticket)
            if ticket.flight is not None:
                self._engine.close(ticket.flight)
            if admitted:
                self._admission.leave()

    async def count_tokens(self, asked: CountRequest) -> bytes:
        """The answer of /v1/tokenizer."""
        if len(asked.text) < _INLINE_CHARS:
            return count_tokens(self._tokenizer, asked)
        return await asyncio.to_thread(count_tokens, self._tokenizer, asked)

    def cancel(self, client_id: str) -> None:
        """End the running request a client calls `client_id` with what it has. Raises NotFound."""
        running = [t.flight for t in self._tickets if t.client_id == client_id and t.flight is not None]
        if not running:
            raise NotFound("no request of this id is running; it may have ended already")
        for flight in running:
            flight.cancelled = True

    async def watch_deadlines(self) -> None:
        """Runs for ever: ends requests whose time is up."""
        limit_s = self._settings.e2e_timeout_s
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for ticket in list(self._tickets):
                age, flight = now - ticket.arrival, ticket.flight
                if age > limit_s + _STALL_S:
                    ticket.task.cancel()  # its end cannot be written: the client does not read
                elif age > limit_s:
                    ticket.end(RequestTimeout(f"{_TIMEOUT}: no end within e2eTimeout = {limit_s} s"))
                elif flight is not None and now - flight.last_token > flight.token_limit_s:
                    allowed = f"{flight.token_limit_s:g} s (tokenTimeout, or the request's timeout)"
                    ticket.end(RequestTimeout(f"{_TIMEOUT}: no token within {allowed}"))

    def stop_accepting(self) -> None:
        self._stopping = True

    async def drained(self, deadline_s: float) -> None:
        """Wait for running requests; what is left at the deadline ends with an error event."""
        await self._until_empty(deadline_s)
        for ticket in list(self._tickets):
            ticket.end(ServiceUnavailable("the service was stopped before this request ended; send it again"))
        await self._until_empty(_LAST_FRAMES_S)

    async def idle(self) -> None:
        """Wait until no request is left, however long that takes."""
        await self._until_empty(math.inf)

    async def _until_empty(self, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while self._tickets and time.monotonic() < until:
            await asyncio.sleep(0.01)

    # -- the parts of open --------------------------------------------------------------------------

    def _check_accepting(self) -> None:
        if self._stopping:
            raise ServiceUnavailable(
                "service has been stopped; send the request to another server", retry_after_s=5
            )
        if not self._engine.available:
            raise ServiceUnavailable(
                "the model is not ready; see /v2/health/live for the progress", retry_after_s=5
            )

    async def _encode(self, request: GenerationRequest) -> Sequence[int]:
        if isinstance(request.prompt, str):
            return await self._tokenizer.encode_async(request.prompt)
        if isinstance(request.prompt, ChatPrompt):
            return await self._tokenizer.encode_chat_async(request.prompt)
        vocab_size = self.info.vocab_size
        for token_id in request.prompt:
            if not 0 <= token_id < vocab_size:
                raise GenerationRefused(
                    f"token id {token_id} is outside the vocabulary; allowed: [0, {vocab_size - 1}]"
                )
        return request.prompt

    def _fit(self, ids: Sequence[int], keep_last: int | None) -> Sequence[int]:
        check_token_count(len(ids))
        if keep_last is not None:
            ids = ids[-keep_last:]
        limit = self.info.max_prompt_tokens
        if not ids:
            raise GenerationRefused("the prompt encodes to no tokens; send some text")
        if len(ids) <= limit:
            return ids
        if self._truncation == "off":
            raise GenerationRefused(
                f"the prompt has {len(ids)} tokens; allowed: [1, {limit}] (maxInputTokenLen, maxSeqLen - 1, "
                "the model's positions); shorten it, or let the server cut it (config key `truncation`)"
            )
        return ids[:limit] if self._truncation == "keep_head" else ids[-limit:]

    async def _submit(self, request: GenerationRequest, prompt_ids: Sequence[int], arrival: float) -> Flight:
        sampling = replace(
            request.sampling,
            max_tokens=min(request.sampling.max_tokens, self.info.max_seq_len - len(prompt_ids)),
            ignore_eos=request.sampling.ignore_eos or self._ignore_eos,
        )
        token_limit_s = min(
            self._settings.token_timeout_s, request.timeout_s or self._settings.token_timeout_s
        )
        return await self._engine.submit(
            prompt_ids, sampling, request.priority, arrival=arrival, token_limit_s=token_limit_s
        )

    def _stream(
        self, request: GenerationRequest, flight: Flight, prompt_ids: Sequence[int]
    ) -> GenerationStream:
        context = ReplyContext(
            request_number=next(self._numbers),
            model=self.info,
            prompt_tokens=len(prompt_ids),
            prompt_text=request.prompt if isinstance(request.prompt, str) else "",
            full_text_frames=self._settings.full_text,
            prompt_ids=prompt_ids,
        )
        self._metrics.submitted(len(prompt_ids))
        return GenerationStream(
            self._engine, flight, self._tokenizer, request, prompt_ids, context, self._metrics
        )
