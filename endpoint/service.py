"""From a checked request to a stream of text: admission, tokenizing, limits, timeouts, abort."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from endpoint.admission import LINE_FULL, WAITING_TOKENS, Admission, Place
from endpoint.api_keys import ApiKey
from endpoint.bounds import Bounds
from endpoint.engine_client import EngineClient
from endpoint.flights import Flight
from endpoint.generation_stream import GenerationStream
from endpoint.grammars import GrammarChecker
from endpoint.metrics import Metrics
from endpoint.protocols.base import ChatPrompt, GenerationRequest, ModelInfo, ReplyContext
from endpoint.reasoning import (
    END,
    OPENER,
    PROMPT_END_TOKENS,
    Opening,
    find_opening,
    find_opening_within,
)
from endpoint.request_log import RequestRecord
from endpoint.token_count import CountRequest, count_tokens
from endpoint.tokenizer import TokenizerPool
from endpoint.validation import check_prompt_logprobs, check_token_count, show
from engine.errors import (
    GenerationRefused,
    InvalidRequest,
    NotFound,
    RequestTimeout,
    ServerError,
    ServiceUnavailable,
)
from engine.sampling_params import branch_seed
from engine.settings import EndpointSettings, ModelSettings, ScheduleSettings

_SWEEP_S = 0.1  # how often deadlines are looked at: one timer for all requests instead of one per token
_INLINE_CHARS = 2000  # longer texts are counted beside the event loop
_STALL_S = 60.0  # for writing the end of an answer whose time is up
_LAST_FRAMES_S = 1.0  # for writing error events when the service stops
_WAITING_CACHES = 4  # prompt tokens that may wait, unless configured: so many times the cache
_TIMEOUT = "Engine callback timeout"  # clients match on this beginning


@dataclass(slots=True, eq=False)
class _Ticket:
    """One request from its arrival to its last byte."""

    task: asyncio.Task[Any]
    arrival: float  # monotonic seconds
    flight: Flight | None = None  # once it is in the engine
    verdict: ServerError | None = None  # why its task was cancelled by us
    cancelled: bool = False  # its task was cancelled by us, but for no error
    asked_limit_s: float | None = None  # longest wait for a token, as the request has it

    def cancel(self) -> None:
        """End it well with what it has, wherever it is."""
        if self.flight is not None:
            self.flight.cancel()
        elif self.verdict is None and not self.cancelled:
            self.cancelled = True
            self.task.cancel()

    def end(self, verdict: ServerError) -> None:
        """End it with an error, wherever it is."""
        if self.flight is not None:
            self.flight.fail(verdict)
        elif self.verdict is None and not self.cancelled:
            self.verdict = verdict
            self.task.cancel()


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
        grammars: GrammarChecker,
    ) -> None:
        self.info = info
        self._grammars = grammars
        self._metrics = metrics
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = endpoint
        self._truncation = schedule.truncation
        self._ignore_eos = model.ignore_eos
        cache_tokens = engine.limits().num_blocks * len(engine.occupancy()) * schedule.block_size
        self._default_waiting_tokens = _WAITING_CACHES * cache_tokens
        self.admission = Admission(endpoint.max_link_num, self._max_waiting_tokens(endpoint))
        # lines of their own: neither needs the model, and who waits there must not keep others from it
        self._counting = Admission(endpoint.max_link_num)
        self._trials = Admission(endpoint.max_link_num)
        self._numbers = itertools.count(1)
        self._stopping = False
        self.is_paused: Callable[[], bool] = lambda: False  # whether an operator wants no new requests now
        self._tickets: set[_Ticket] = set()
        # by the names under which the same key can cancel them
        self._named: dict[tuple[ApiKey | None, str], _Ticket] = {}

    @asynccontextmanager
    async def open(
        self, request: GenerationRequest, name: str, record: RequestRecord, key: ApiKey | None = None
    ) -> AsyncIterator[GenerationStream]:
        """Admit, tokenize and submit; leaving the block, by any door, ends what still runs.

        `name`: by which its key can cancel it, unless a running request has it. `record`: of its milestones.
        `key`: whose request it is. Raises ServiceUnavailable, QuotaExceeded, GenerationRefused,
        InvalidRequest or RequestTimeout.
        """
        task = asyncio.current_task()
        assert task is not None
        ticket = _Ticket(task, time.monotonic(), asked_limit_s=request.timeout_s)
        record.opened = ticket.arrival
        names = self._name(ticket, key, request.client_id, name)
        self._tickets.add(ticket)
        place: Place | None = None
        try:
            try:
                self._check_accepting(admitted=False)
                request = await self._with_tried_grammar(request, key)
                place = await self.admission.enter(key)
                record.admitted = time.monotonic()
                self._check_accepting(admitted=True)  # the wait may have been long
                encoded = await self._encode(request)
                if request.reasoning:
                    encoded = [self._open_reasoning(request, ids) for ids in encoded]
                prompts = [self._fit(ids, request.keep_last) for ids in encoded]
                if request.sampling.prompt_logprobs >= 0:
                    check_prompt_logprobs(sum(map(len, prompts)), request.sampling.prompt_logprobs)
                place.expect_first_token(sum(map(len, prompts)))
                ticket.flight = await self._submit(request, prompts, ticket.arrival, key)
            except asyncio.CancelledError:
                if ticket.verdict is not None:
                    raise ticket.verdict from None
                if not ticket.cancelled:
                    raise
                # nothing of it was fed to the model
                prompts = [()] * len(request.prompts)
                ticket.flight = Flight.never_flown(ticket.arrival)
            record.stream = self._stream(request, ticket.flight, prompts, place)
            yield record.stream
        finally:
            self._tickets.discard(ticket)
            for given in names:
                del self._named[given]
            if ticket.flight is not None:
                self._engine.close(ticket.flight)
            if place is not None:
                place.leave()

    def check_room(self, key: ApiKey | None) -> None:
        """Refuse what `open` would refuse, before the body is read. Raises as `open` does."""
        self._check_accepting(admitted=False)
        self.admission.check_room(key)

    def _max_waiting_tokens(self, settings: EndpointSettings) -> int:
        return settings.max_waiting_tokens or self._default_waiting_tokens

    async def count_tokens(self, asked: CountRequest, key: ApiKey | None = None) -> bytes:
        """The answer of /v1/tokenizer. Raises ServiceUnavailable or QuotaExceeded."""
        place = await self._counting.enter(key)
        try:
            if len(asked.text) < _INLINE_CHARS:
                return count_tokens(self._tokenizer, asked)
            return await asyncio.to_thread(count_tokens, self._tokenizer, asked)
        finally:
            place.leave()

    def cancel(self, name: str, key: ApiKey | None = None) -> None:
        """End this key's request of this name at once, with what it has. Raises NotFound."""
        ticket = self._named.get((key, name))
        if ticket is None:
            raise NotFound("no request of this id is running; it may have ended already")
        ticket.cancel()

    async def watch_deadlines(self) -> None:
        """Runs for ever: ends requests whose time is up."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now, limit_s = time.monotonic(), self._settings.e2e_timeout_s
            for ticket in list(self._tickets):
                age, flight = now - ticket.arrival, ticket.flight
                if age > limit_s + _STALL_S:
                    ticket.task.cancel()  # its end cannot be written: the client does not read
                elif age > limit_s:
                    ticket.end(RequestTimeout(f"{_TIMEOUT}: no end within e2eTimeout = {limit_s} s"))
                elif flight is not None and now - flight.last_token > flight.token_limit_s:
                    allowed = f"{flight.token_limit_s:g} s (tokenTimeout, or the request's timeout)"
                    ticket.end(RequestTimeout(f"{_TIMEOUT}: no token within {allowed}"))

    def is_saturated(self) -> bool:
        """Whether the next request would be refused because the line is full."""
        return self.admission.is_full

    def register_bounds(self, bounds: Bounds) -> None:
        def limit() -> int:
            return self._settings.max_link_num  # changes with the configuration

        bounds.register("requests_running", lambda: self.admission.running, limit)
        bounds.register(
            "requests_waiting",
            lambda: self.admission.waiting,
            lambda: 2 * limit(),
            lambda: self.admission.refused[LINE_FULL],
        )
        bounds.register(
            "waiting_tokens",
            lambda: self.admission.waiting_tokens,
            lambda: self._max_waiting_tokens(self._settings),
            lambda: self.admission.refused[WAITING_TOKENS],
        )
        bounds.register("tokenizer_queue", lambda: self._tokenizer.num_queued, limit)
        self._grammars.register_bounds(bounds, limit)
        self._engine.register_bounds(bounds)

    def reconfigure(self, settings: EndpointSettings) -> None:
        """Take over what may change while serving; the time limits are those of running requests too.

        To be called after ApiKeys.replace as well: a key's higher limit may let somebody in.
        """
        self._settings = settings
        self.admission.set_limit(settings.max_link_num, self._max_waiting_tokens(settings))
        for line in (self._counting, self._trials):
            line.set_limit(settings.max_link_num)
        for ticket in self._tickets:
            if ticket.flight is not None:
                ticket.flight.token_limit_s = self._token_limit_s(ticket.asked_limit_s)

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

    def _check_accepting(self, *, admitted: bool) -> None:
        """What has been admitted waits for an instance that is being replaced; what is new is refused."""
        if self._stopping:
            raise ServiceUnavailable(
                "service has been stopped; send the request to another server", retry_after_s=5
            )
        if self.is_paused():
            raise ServiceUnavailable(
                "the service is paused by an operator (fault-handling-command); send the request to another "
                "server, or again once it is started",
                retry_after_s=5,
            )
        if not (self._engine.available or (admitted and self._engine.recovering)):
            raise ServiceUnavailable(
                "the model is not ready; see /v2/health/live for the progress", retry_after_s=5
            )

    def _name(
        self, ticket: _Ticket, key: ApiKey | None, client_id: str | None, name: str
    ) -> list[tuple[ApiKey | None, str]]:
        """Let the ticket go by these names of its key, and tell them.

        Raises InvalidRequest when another request has the first one.
        """
        if client_id is not None and (key, client_id) in self._named:
            raise InvalidRequest(
                f"`id` is {show(client_id)}, which is the id of a request that still runs; send another "
                "one, or none, or wait for the end of that request"
            )
        wanted = {client_id, None if (key, name) in self._named else name} - {None}
        names = [(key, one) for one in wanted if one is not None]
        self._named |= dict.fromkeys(names, ticket)
        return names

    async def _encode(self, request: GenerationRequest) -> list[Sequence[int]]:
        encoded = []
        for prompt in request.prompts:
            encoded.append(await self._encode_one(prompt))
            if len(request.prompts) > 1:
                await asyncio.sleep(0)  # short texts are encoded on the spot, but there may be many
        return encoded

    async def _encode_one(self, prompt: str | tuple[int, ...] | ChatPrompt) -> Sequence[int]:
        if isinstance(prompt, str):
            ids: Sequence[int] = await self._tokenizer.encode_async(prompt)
        elif isinstance(prompt, ChatPrompt):
            ids = await self._tokenizer.encode_chat_async(prompt)
        else:
            ids = prompt
        vocab_size = self.info.vocab_size
        if isinstance(prompt, tuple) or self._tokenizer.vocab_size > vocab_size:
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise GenerationRefused(
                        f"token id {token_id} is outside the vocabulary; allowed: [0, {vocab_size - 1}]"
                    )
        return ids

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

    async def _submit(
        self,
        request: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        arrival: float,
        key: ApiKey | None,
    ) -> Flight:
        asked = request.sampling
        parts = [
            (
                ids,
                replace(
                    asked,
                    max_tokens=min(asked.max_tokens, self.info.max_seq_len - len(ids)),
                    ignore_eos=asked.ignore_eos or self._ignore_eos,
                    seed=branch_seed(asked.seed, index * asked.branches),
                    reasoning_end=self._reasoning_end(request, ids),
                ),
            )
            for index, ids in enumerate(prompts)
        ]
        return await self._engine.submit(
            parts,
            request.priority,
            arrival=arrival,
            token_limit_s=self._token_limit_s(request.timeout_s),
            cache_salt=b"" if key is None else key.cache_salt,
        )

    def _token_limit_s(self, asked: float | None) -> float:
        return min(self._settings.token_timeout_s, asked or self._settings.token_timeout_s)

    async def _with_tried_grammar(self, request: GenerationRequest, key: ApiKey | None) -> GenerationRequest:
        """Before it has a place: a trial takes seconds, and many stand in line for theirs."""
        sampling = request.sampling
        if not sampling.grammar:
            return request
        place = await self._trials.enter(key)
        try:
            grammar = await self._grammars.check(sampling.grammar, request.grammar_field)
        finally:
            place.leave()
        return replace(request, sampling=replace(sampling, grammar=grammar))

    # -- reasoning ----------------------------------------------------------------------------------

    def _opening(self, request: GenerationRequest, ids: Sequence[int]) -> Opening:
        if not request.reasoning:
            return Opening.NOBODY
        prompt = request.prompt
        if isinstance(prompt, ChatPrompt) and prompt.continue_final:
            return find_opening_within(prompt.messages[-1]["content"])
        return find_opening(self._tokenizer.decode(ids[-PROMPT_END_TOKENS:], skip_special_tokens=False))

    def _open_reasoning(self, request: GenerationRequest, ids: Sequence[int]) -> Sequence[int]:
        """The prompt, ending with `<think>` if somebody has to know whether the model reasons.

        A grammar begins after the reasoning, and a budget counts it: neither can be left to what the model
        may do.
        """
        prompt, sampling = request.prompt, request.sampling
        bound = bool(sampling.grammar or sampling.thinking_budget)
        wanted = isinstance(prompt, ChatPrompt) and prompt.template_kwargs.get("enable_thinking") is not False
        if bound and wanted and self._opening(request, ids) is Opening.MODEL:
            return [*ids, *self._tokenizer.encode_bare(OPENER)]
        return ids

    def _reasoning_end(self, request: GenerationRequest, ids: Sequence[int]) -> tuple[int, ...]:
        """SamplingParams.reasoning_end."""
        if self._opening(request, ids) is not Opening.PROMPT:
            return ()
        return tuple(self._tokenizer.encode_bare(END))

    def _stream(
        self,
        request: GenerationRequest,
        flight: Flight,
        prompts: Sequence[Sequence[int]],
        place: Place | None,
    ) -> GenerationStream:
        prompt_tokens = sum(map(len, prompts))
        context = ReplyContext(
            request_number=next(self._numbers),
            model=self.info,
            prompt_tokens=prompt_tokens,
            prompt_text=request.prompt if isinstance(request.prompt, str) else "",
            full_text_frames=self._settings.full_text,
            prompt_ids=prompts[0],
            echoes=self._echoes(request) if request.echo else (),
            prompt_lengths=[len(ids) for ids in prompts],
            opening=self._opening(request, prompts[0]),
            cached_tokens=lambda: flight.cached_tokens,
        )
        self._metrics.submitted(prompt_tokens)
        return GenerationStream(
            self._engine, flight, self._tokenizer, request, prompts, context, self._metrics, place
        )

    def _echoes(self, request: GenerationRequest) -> list[str]:
        skip = request.skip_special_tokens
        return [
            prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip)
            for prompt in request.prompts
            if not isinstance(prompt, ChatPrompt)
        ]
