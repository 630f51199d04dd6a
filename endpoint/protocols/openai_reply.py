"""What the answers of chat and text completions share: usage, and the frames of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

from endpoint import sse
from endpoint.http_errors import error_text
from endpoint.protocols.base import (
    Body,
    Completion,
    FinishReason,
    GenerationRequest,
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


def usage(prompt_tokens: int, batch_sizes: list[int], queue_waits_us: list[int]) -> dict[str, Any]:
    """The usage object; one entry of each list per generated token."""
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": len(batch_sizes),
        "total_tokens": prompt_tokens + len(batch_sizes),
        "batch_size": batch_sizes,
        "queue_wait_time": queue_waits_us,
    }


@dataclass(slots=True)
class _Counts:
    """Of the tokens of one choice."""

    batch_sizes: list[int] = field(default_factory=list)
    queue_waits_us: list[int] = field(default_factory=list)


class OpenAIReply(ABC):
    """Frames and result of one request; the subclasses know the shape of a choice."""

    chunk_object: ClassVar[str]
    result_object: ClassVar[str]

    def __init__(self, request: GenerationRequest, body: Body, context: ReplyContext) -> None:
        options = body.get("stream_options") or {}
        self._include_usage: bool = options.get("include_usage") is True
        self._context = context
        self._n = request.n
        self._counts = [_Counts() for _ in range(request.n)]
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
        counts.batch_sizes.append(step.batch_size)
        counts.queue_waits_us.append(step.queue_wait_us)
        text = step.full_text if self._context.full_text_frames else step.text
        if step.finish is None:
            return sse.frame(f'{self._chunk_head},"choices":[{self._unfinished_choice(step, text)}]}}')
        members = self._usage_member([counts])
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
        counts = [_Counts(c.batch_sizes, c.queue_waits_us) for c in completions]
        members = {
            "choices": self._whole_choices(completions[: self._n]),
            "usage": self._usage(counts),
            **self._timings(completions[0]),
        }
        return f"{self._head(self.result_object)},{sse.dumps(members)[1:]}".encode()

    def _note_whole(self, completions: Sequence[Completion]) -> None:
        """Count what is streamed in whole choices, without steps."""
        self._counts = [_Counts(c.batch_sizes, c.queue_waits_us) for c in completions]

    def _usage_member(self, counts: Sequence[_Counts]) -> dict[str, Any]:
        # with include_usage the totals follow in their own frame: clients add up every usage they see
        return {} if self._include_usage else {"usage": self._usage(counts)}

    def _usage(self, counts: Sequence[_Counts]) -> dict[str, Any]:
        return usage(
            self._context.prompt_tokens,
            list(chain.from_iterable(c.batch_sizes for c in counts)),
            list(chain.from_iterable(c.queue_waits_us for c in counts)),
        )

    def _chunk(self, members: dict[str, Any]) -> bytes:
        return sse.frame(f"{self._chunk_head},{sse.dumps(members)[1:]}")

    def _head(self, kind: str) -> str:
        model = self._context.model
        # the wall clock may be set back while the server runs
        created = max(int(time.time()), model.created)
        number = self._context.request_number
        return (
            f'{{"id":"endpoint_common_{number}","object":"{kind}","created":{created},'
            f'"model":{sse.json_text(model.name)}'
        )
