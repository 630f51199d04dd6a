"""From a checked request to a stream of text: admission, tokenizing, limits, timeouts, abort."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from endpoint.detokenizer import IncrementalDetokenizer
from endpoint.engine_client import EngineClient, Flight, Token
from endpoint.protocols.base import (
    ChatPrompt,
    Completion,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    ReplyContext,
    TokenStep,
)
from endpoint.tokenizer import TokenizerPool
from engine.errors import GenerationRefused, RequestTimeout, ServiceUnavailable
from engine.outcome import FinishCode
from engine.settings import EndpointSettings, ModelSettings, ScheduleSettings

_FINISH = {
    FinishCode.EOS: FinishReason.EOS,
    FinishCode.STOP_TOKEN: FinishReason.STOP,
    FinishCode.LENGTH: FinishReason.LENGTH,
}
_SWEEP_S = 0.1  # how often deadlines are looked at: one timer for all requests instead of one per token
_TIMEOUT = "Engine callback timeout"  # clients match on this beginning


class Admission:
    """At most `limit` requests at once, twice as many waiting in order, the next one refused."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def running(self) -> int:
        return self._running

    def try_enter(self) -> bool:
        if self._running >= self._limit:
            return False
        self._running += 1
        return True

    async def wait_turn(self) -> None:
        """Stand in line. Raises ServiceUnavailable when the line is full."""
        if len(self._waiting) >= 2 * self._limit:
            raise ServiceUnavailable(
                f"the server is full: {self._limit} requests are running (maxLinkNum) and {2 * self._limit} "
                "are waiting; try again later",
                retry_after_s=1,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # the place was handed over just before the client went away
            raise

    def leave(self) -> None:
        """Give the place to the next in line that still wants it."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._running -= 1


class GenerationStream:
    """The text steps of one request. Iterate it once, or `collect` it."""

    def __init__(
        self,
        flight: Flight,
        detokenizer: IncrementalDetokenizer,
        request: GenerationRequest,
        context: ReplyContext,
    ) -> None:
        self.context = context
        self._flight = flight
        self._detokenizer = detokenizer
        self._request = request
        self._pieces: list[str] = []
        self._num_tokens = 0
        self._previous = flight.arrival

    async def __aiter__(self) -> AsyncIterator[TokenStep]:
        while True:
            step = self._step(await self._flight.next())
            yield step
            if step.finish is not None:
                return

    async def collect(self) -> Completion:
        steps = [step async for step in self]
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
        )

    def _step(self, token: Token) -> TokenStep:
        finish = _FINISH.get(token.finish)
        stop_reason: str | int | None = None
        if token.finish is FinishCode.STOP_TOKEN and not self._request.include_stop:
            stop_reason = token.token_id
            delta = self._detokenizer.finish()
        else:
            if token.finish is FinishCode.STOP_TOKEN:
                stop_reason = token.token_id
            delta = self._detokenizer.push(token.token_id, last=finish is not None)
        if delta.stop_hit is not None:
            finish, stop_reason = FinishReason.STOP, delta.stop_hit
        self._pieces.append(delta.text)
        whole = finish is not None or self.context.full_text_frames
        latency_ms = (token.at - self._previous) * 1e3
        self._previous = token.at
        index = self._num_tokens
        self._num_tokens += 1
        return TokenStep(
            token_id=token.token_id,
            text=delta.text,
            full_text="".join(self._pieces) if whole else "",
            index=index,
            latency_ms=latency_ms,
            batch_size=token.batch_size,
            queue_wait_us=token.queue_wait_us,
            finish=finish,
            stop_reason=stop_reason,
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
    ) -> None:
        self.info = info
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = endpoint
        self._truncation = schedule.truncation
        self._ignore_eos = model.ignore_eos
        self._admission = Admission(endpoint.max_link_num)
        self._numbers = itertools.count(1)
        self._stopping = False

    @property
    def accepting(self) -> bool:
        return not self._stopping and self._engine.available

    @asynccontextmanager
    async def open(self, request: GenerationRequest) -> AsyncIterator[GenerationStream]:
        """Admit, tokenize and submit; leaving the block, by any door, ends what still runs.

        Raises ServiceUnavailable, GenerationRefused, InvalidRequest or RequestTimeout.
        """
        arrival = time.monotonic()
        self._check_accepting()
        await self._admit()
        try:
            self._check_accepting()  # the wait may have been long
            prompt_ids = self._fit(await self._encode(request))
            flight = await self._submit(request, prompt_ids, arrival)
            try:
                yield self._stream(request, flight, prompt_ids)
            finally:
                self._engine.close(flight)
        finally:
            self._admission.leave()

    async def watch_deadlines(self) -> None:
        """Runs for ever: ends requests whose time is up."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for flight in self._engine.flights():
                if now - flight.arrival > self._settings.e2e_timeout_s:
                    cause = f"no end within e2eTimeout = {self._settings.e2e_timeout_s} s"
                elif now - flight.last_token > flight.token_limit_s:
                    cause = (
                        f"no token within {flight.token_limit_s:g} s (tokenTimeout, or the request's timeout)"
                    )
                else:
                    continue
                self._engine.close(flight)
                flight.fail(RequestTimeout(f"{_TIMEOUT}: {cause}"))

    def stop_accepting(self) -> None:
        self._stopping = True

    async def drained(self, deadline_s: float) -> None:
        """Wait for running requests; what is left at the deadline ends with an error event."""
        until = time.monotonic() + deadline_s
        while self._admission.running and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for flight in self._engine.flights():
            self._engine.close(flight)
            flight.fail(
                ServiceUnavailable("the service was stopped before this request ended; send it again")
            )
        until = time.monotonic() + 1.0
        while self._admission.running and time.monotonic() < until:
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

    async def _admit(self) -> None:
        if self._admission.try_enter():
            return
        limit_s = self._settings.e2e_timeout_s
        try:
            await asyncio.wait_for(self._admission.wait_turn(), limit_s)
        except asyncio.TimeoutError:
            raise RequestTimeout(f"{_TIMEOUT}: waited {limit_s} s (e2eTimeout) for a place") from None

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

    def _fit(self, ids: Sequence[int]) -> Sequence[int]:
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
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            prompt_ids,
            skip_special_tokens=request.skip_special_tokens,
            stop=request.stop,
            include_stop=request.include_stop,
        )
        context = ReplyContext(
            request_number=next(self._numbers),
            model=self.info,
            prompt_tokens=len(prompt_ids),
            prompt_text=request.prompt if isinstance(request.prompt, str) else "",
            full_text_frames=self._settings.full_text,
        )
        return GenerationStream(flight, detokenizer, request, context)
