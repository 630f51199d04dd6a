"""From the tokens of a request to its steps of text, choice by choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from endpoint.admission import Place
from endpoint.detokenizer import IncrementalDetokenizer, StopStrings
from endpoint.engine_client import EngineClient
from endpoint.flights import Flight, PromptRow, Token
from endpoint.metrics import Metrics
from endpoint.protocols.base import (
    NO_TOKEN,
    Completion,
    FinishReason,
    GenerationRequest,
    PromptToken,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.tokenizer import TokenizerPool
from engine.outcome import FinishCode

_FINISH = {
    FinishCode.EOS: FinishReason.EOS,
    FinishCode.STOP_TOKEN: FinishReason.STOP,
    FinishCode.LENGTH: FinishReason.LENGTH,
}


class _Choice:
    """The text of one branch as it grows."""

    def __init__(
        self, index: int, detokenizer: IncrementalDetokenizer, arrival: float, logprobs: bool
    ) -> None:
        self.index = index
        self._logprobs = logprobs
        self._detokenizer = detokenizer
        self._pieces: list[str] = []
        self.num_tokens = 0
        self._previous = arrival
        self.finish: FinishReason | None = None

    def step(
        self,
        token: Token,
        include_stop: bool,
        whole: bool,
        words: TokenizerPool,
        prompt: Sequence[PromptToken],
    ) -> TokenStep:
        """`whole`: the full text is wanted although this is not the last step."""
        finish = _FINISH.get(token.finish)
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
        position, self.num_tokens = self.num_tokens, self.num_tokens + 1
        self.finish = finish
        return TokenStep(
            token_id=token.token_id,
            text=delta.text,
            full_text="".join(self._pieces) if whole or finish is not None else "",
            index=position,
            latency_ms=latency_ms,
            batch_size=token.batch_size,
            queue_wait_us=token.queue_wait_us,
            finish=finish,
            stop_reason=stop_reason,
            choice=self.index,
            logprob=_named(words, token.token_id, token.logprob) if self._logprobs else None,
            top_logprobs=tuple(_named(words, *entry) for entry in token.top),
            prompt=prompt,
        )

    def cancel(self) -> TokenStep:
        """The last step, without a token: what was held back comes out."""
        text = self._detokenizer.finish().text
        self._pieces.append(text)
        self.finish = FinishReason.CANCELLED
        return TokenStep(
            token_id=NO_TOKEN,
            text=text,
            full_text="".join(self._pieces),
            index=self.num_tokens,
            latency_ms=0.0,
            batch_size=0,
            queue_wait_us=0,
            finish=FinishReason.CANCELLED,
            choice=self.index,
        )

    @property
    def begun(self) -> bool:
        return self.num_tokens > 0


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
        prompts: Sequence[Sequence[int]],
        context: ReplyContext,
        metrics: Metrics,
        place: Place | None,
    ) -> None:
        """`prompts`: the ids of each, as they were submitted. `place`: None when none was needed."""
        self.context = context
        self._engine = engine
        self.flight = flight
        self._tokenizer = tokenizer
        self._request = request
        self._metrics = metrics
        self._place = place
        self.complete = False  # every choice has ended well
        self.first: Token | None = None  # of any choice
        self._prompts = prompts
        self._prompt_tokens: dict[int, Sequence[PromptToken]] = {}  # by prompt
        self._branches = request.sampling.branches
        self._stop = StopStrings(request.stop) if request.stop else None
        self._choices = [self._choice(index) for index in range(len(prompts) * self._branches)]

    def _choice(self, index: int) -> _Choice:
        request = self._request
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            self._prompts[index // self._branches],
            skip_special_tokens=request.skip_special_tokens,
            stop=self._stop,
            include_stop=request.include_stop,
            kept=self._tokenizer.ids_of_special(request.markers),
        )
        return _Choice(index, detokenizer, self.flight.arrival, request.sampling.logprobs >= 0)

    def unread_bytes(self) -> int:
        """About what has come from the engine and was not iterated over yet."""
        return self.flight.unread_bytes

    async def __aiter__(self) -> AsyncIterator[TokenStep]:
        whole, left, generated = self.context.full_text_frames, len(self._choices), 0
        while left:
            token = await self.flight.next()
            if token is None:
                break
            choice = self._choices[token.branch]
            if choice.finish is not None:
                continue  # computed before the engine heard of the stop string
            begins = not choice.begun
            prompt = await self._prompt_of(choice) if begins else ()
            step = choice.step(token, self._request.include_stop, whole, self._tokenizer, prompt)
            generated += 1
            self._metrics.token()
            self._account(choice, begins)
            if generated == 1:
                self.first = token
                self._metrics.first_token(token.at - self.flight.submitted)
            elif not begins:
                self._metrics.next_token(step.latency_ms / 1e3)
            if choice.finish is not None:
                left -= 1
                self._engine.end_branch(self.flight, token.branch)
            yield step
        self._engine.close(self.flight)
        for choice in self._choices:  # of a request that was cancelled
            if choice.finish is None:
                yield choice.cancel()
        self._metrics.finished(generated)
        self.complete = True

    @property
    def output_tokens(self) -> int:
        """Generated so far, by all choices."""
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def finishes(self) -> Sequence[str]:
        """Why its choices ended, each reason once."""
        return list(dict.fromkeys(choice.finish.value for choice in self._choices if choice.finish))

    def _account(self, choice: _Choice, begins: bool) -> None:
        """A token of this choice has come."""
        if self._place is None:
            return
        self._place.token_generated()
        number, branch = divmod(choice.index, self._branches)
        if begins and branch == 0:  # of the branches of a prompt one tells that it no longer waits
            self._place.prompt_begun(len(self._prompts[number]))

    async def _prompt_of(self, choice: _Choice) -> Sequence[PromptToken]:
        if self._request.sampling.prompt_logprobs < 0:
            return ()
        number = choice.index // self._branches
        if number not in self._prompt_tokens:
            ids, rows = self._prompts[number], self.flight.parts[number].prompt_rows
            # tens of thousands of tokens may have to be named
            self._prompt_tokens[number] = await asyncio.to_thread(_name_prompt, self._tokenizer, ids, rows)
        return self._prompt_tokens[number]

    async def collect(self) -> list[Completion]:
        """The choices of every prompt, then the candidates that were not chosen.

        The choices are as generated, or the most likely first where more were generated than asked for.
        """
        steps: list[list[TokenStep]] = [[] for _ in self._choices]
        async for step in self:
            steps[step.choice].append(step)
        completions = [_completion(of_choice) for of_choice in steps]
        n = self._request.n
        if n == self._branches:
            return completions
        chosen: list[Completion] = []
        rest: list[Completion] = []
        for start in range(0, len(completions), self._branches):
            ranked = sorted(completions[start : start + self._branches], key=_unlikeliness)
            chosen += ranked[:n]
            rest += ranked[n:]
        return chosen + rest


def _unlikeliness(completion: Completion) -> float:
    return -sum(token.logprob for token in completion.logprobs)


def _name_prompt(
    words: TokenizerPool, ids: Sequence[int], rows: Sequence[PromptRow]
) -> Sequence[PromptToken]:
    """`rows`: one per token but the first."""
    texts: dict[int, str] = {}

    def named(token_id: int, logprob: float) -> TokenLogprob:
        if token_id not in texts:
            texts[token_id] = words.decode([token_id], skip_special_tokens=False)
        return TokenLogprob(token_id, texts[token_id], logprob)

    return [
        PromptToken(named(ids[0], 0.0), 0, ()),
        *(
            PromptToken(
                named(row.token_id, row.logprob), row.rank, tuple(named(*entry) for entry in row.others)
            )
            for row in rows
        ),
    ]


def _completion(steps: Sequence[TokenStep]) -> Completion:
    last = steps[-1]
    assert last.finish is not None
    made = steps if last.token_id != NO_TOKEN else steps[:-1]
    return Completion(
        text=last.full_text,
        token_ids=[step.token_id for step in made],
        finish=last.finish,
        stop_reason=last.stop_reason,
        latencies_ms=[step.latency_ms for step in made],
        batch_sizes=[step.batch_size for step in made],
        queue_waits_us=[step.queue_wait_us for step in made],
        logprobs=[step.logprob for step in made if step.logprob is not None],
        top_logprobs=[step.top_logprobs for step in made],
        prompt=steps[0].prompt,
        pieces=[step.text for step in steps],
    )
