"""What the answers of chat and text completions share: usage, and the frames of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, ClassVar

from endpoint import sse
from endpoint.http_errors import error_text
from endpoint.protocols.base import (
    NO_TOKEN,
    Body,
    Completion,
    FinishReason,
    GenerationRequest,
    PromptToken,
    ReplyContext,
    TokenStep,
)
from engine.errors import ServerError

FINISH: dict[FinishReason, str] = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "stop",
}


def usage(
    prompt_tokens: int, cached_tokens: int, batch_sizes: list[int], queue_waits_us: list[int]
) -> dict[str, Any]:
    """The usage object; one entry of each list per generated token."""
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens": len(batch_sizes),
        "total_tokens": prompt_tokens + len(batch_sizes),
        "batch_size": batch_sizes,
        "queue_wait_time": queue_waits_us,
    }


def prompt_logprobs(prompt: Sequence[PromptToken], num_others: int) -> list[dict[str, Any] | None]:
    """One member per token, null for the first; in each the prompt's own token comes first."""
    members: list[dict[str, Any] | None] = []
    for entry in prompt:
        # the ranks of the others are what the own token's leaves
        places = filter(entry.rank.__ne__, count(1))
        ranked = [(entry.token, entry.rank), *zip(entry.others[:num_others], places, strict=False)]
        members.append(
            {
                str(token.token_id): {"logprob": token.logprob, "rank": rank, "decoded_token": token.text}
                for token, rank in ranked
            }
            if entry.rank
            else None
        )
    return members


@dataclass(slots=True)
class Counts:
    """Of the tokens of one choice."""

    batch_sizes: list[int] = field(default_factory=list)
    queue_waits_us: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0  # looked at only where reasoning is told apart


class OpenAIReply(ABC):
    """Frames and result of one request; the subclasses know the shape of a choice."""

    is_sse = True
    chunk_object: ClassVar[str]
    result_object: ClassVar[str]

    def __init__(self, request: GenerationRequest, body: Body, context: ReplyContext) -> None:
        options = body.get("stream_options") or {}
        self._prompt_logprobs: int | None = body.get("prompt_logprobs")
        self._include_usage: bool = options.get("include_usage") is True
        self._context = context
        self._n = request.n
        self._num_choices = request.num_choices
        self._counts = [Counts() for _ in range(request.num_choices)]
        self._model = request.sampling.lora or context.model.name  # as the client named it
        self._chunk_head = self._head(self.chunk_object)

    @abstractmethod
    def _unfinished_choice(self, step: TokenStep, text: str) -> str:
        """JSON of the choice in a frame that is not its last."""

    @abstractmethod
    def _last_choice(self, step: TokenStep, text: str) -> dict[str, Any]:
        """The choice in its last frame."""

    @abstractmethod
    def _whole_choices(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """The choices of an answer that is not streamed."""

    def _last_members(self, step: TokenStep) -> dict[str, Any]:
        """What the last frame of a choice has at top level besides choices and usage."""
        return {}

    def _timings(self, completion: Completion) -> dict[str, Any]:
        """Top-level members of a whole answer, of its first choice."""
        return {}

    def frame(self, step: TokenStep) -> bytes:
        counts = self._counts[step.choice]
        if step.token_id != NO_TOKEN:
            counts.batch_sizes.append(step.batch_size)
            counts.queue_waits_us.append(step.queue_wait_us)
        text = step.full_text if self._context.full_text_frames else step.text
        if step.finish is None:
            return sse.frame(f'{self._chunk_head},"choices":[{self._unfinished_choice(step, text)}]}}')
        members = self._usage_member([counts], step.choice // self._n)
        return self._chunk(
            {**members, "choices": [self._last_choice(step, text)], **self._last_members(step)}
        )

    def tail(self) -> Sequence[bytes]:
        if not self._include_usage:
            return (sse.DONE,)
        return self._chunk({"choices": [], "usage": self._usage(self._counts)}), sse.DONE

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return sse.frame(error_text(error)), sse.DONE

    def result(self, completions: Sequence[Completion]) -> bytes:
        counts = [self._count(completion) for completion in completions]
        members = {
            "choices": self._whole_choices(completions[: self._num_choices]),
            "usage": self._usage(counts),
            **self._timings(completions[0]),
        }
        return f"{self._head(self.result_object)},{sse.dumps(members)[1:]}".encode()

    def _note_whole(self, completions: Sequence[Completion]) -> None:
        """Count what is streamed in whole choices, without steps."""
        self._counts = [self._count(completion) for completion in completions]

    def _count(self, completion: Completion) -> Counts:
        """Is called once for each whole choice, in their order."""
        return Counts(completion.batch_sizes, completion.queue_waits_us)

    def _usage_member(self, counts: Sequence[Counts], prompt: int | None = None) -> dict[str, Any]:
        """`prompt`: number of the one that is answered; None for all."""
        # with include_usage the totals follow in their own frame: clients add up every usage they see
        return {} if self._include_usage else {"usage": self._usage(counts, prompt)}

    def _usage(self, counts: Sequence[Counts], prompt: int | None = None) -> dict[str, Any]:
        lengths, cached = self._context.prompt_lengths, self._context.cached_tokens()
        if prompt is not None and len(lengths) > 1:
            prompt_tokens = lengths[prompt]
            cached_tokens = cached[prompt] if cached else 0  # it may never have reached the engine
        else:
            prompt_tokens, cached_tokens = self._context.prompt_tokens, sum(cached)
        return usage(
            prompt_tokens,
            cached_tokens,
            list(chain.from_iterable(c.batch_sizes for c in counts)),
            list(chain.from_iterable(c.queue_waits_us for c in counts)),
        )

    def _chunk(self, members: dict[str, Any]) -> bytes:
        return sse.frame(f"{self._chunk_head},{sse.dumps(members)[1:]}")

    def _head(self, kind: str) -> str:
        # the wall clock may be set back while the server runs
        created = max(int(time.time()), self._context.model.created)
        number = self._context.request_number
        return (
            f'{{"id":"endpoint_common_{number}","object":"{kind}","created":{created},'
            f'"model":{sse.json_text(self._model)}'
        )
