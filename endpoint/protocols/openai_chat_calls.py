"""Chat answers in which reasoning and tool calls are told apart from the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from endpoint import sse
from endpoint.protocols.base import (
    NO_TOKEN,
    Body,
    Completion,
    GenerationRequest,
    ReplyContext,
    TokenStep,
)
from endpoint.protocols.chat_parts import ChatParts
from endpoint.protocols.openai_chat_reply import ChatReply
from endpoint.protocols.openai_reply import Counts


class PartedChatReply(ChatReply):
    """As ChatReply, for a request with tools, or to a model whose reasoning is told apart."""

    def __init__(
        self,
        request: GenerationRequest,
        body: Body,
        context: ReplyContext,
        logprobs: int,
        most_calls: int | None,
    ) -> None:
        """`most_calls`: delivered per choice; None for all."""
        super().__init__(request, body, context, logprobs)
        self._request = request
        self._most_calls = most_calls
        self._parts = [self._make_parts() for _ in range(request.num_choices)]
        self._whole: list[ChatParts] = []  # of the choices of an answer that is not streamed by tokens
        self._shown = [("", "")] * request.num_choices  # reasoning and content sent, where frames repeat them

    def _make_parts(self) -> ChatParts:
        return ChatParts(self._request, self._context, self._most_calls)

    # -- frames ---------------------------------------------------------------------------------------

    def frame(self, step: TokenStep) -> bytes:
        parts = self._parts[step.choice]
        parts.push(step.text, last=step.finish is not None, is_token=step.token_id != NO_TOKEN)
        self._counts[step.choice].reasoning_tokens = parts.reasoning_tokens
        return super().frame(step)

    def _unfinished_choice(self, step: TokenStep, text: str) -> str:
        return (
            f'{{"index":{step.choice},"delta":{sse.dumps(self._delta(step.choice, last=False))},'
            f'"logprobs":{self._step_logprobs_json(step)},"finish_reason":null}}'
        )

    def _last_choice(self, step: TokenStep, text: str) -> dict[str, Any]:
        assert step.finish is not None
        return {
            "index": step.choice,
            "delta": self._delta(step.choice, last=True),
            "logprobs": self._step_logprobs(step),
            "finish_reason": self._parts[step.choice].finish_reason(step.finish),
        }

    def _last_members(self, step: TokenStep) -> dict[str, Any]:
        return {"full_text": self._shown[step.choice][1]} if self._context.full_text_frames else {}

    def _delta(self, choice: int, last: bool) -> dict[str, Any]:
        parts = self._parts[choice]
        reasoning, (content, entries) = parts.take_reasoning(), parts.take(last)
        if self._context.full_text_frames:
            before = self._shown[choice]
            reasoning, content = self._shown[choice] = (before[0] + reasoning, before[1] + content)
        return _delta(reasoning, content, entries, parts.reasons, last)

    # -- whole choices --------------------------------------------------------------------------------

    def _count(self, completion: Completion) -> Counts:
        parts = self._make_parts()
        self._whole.append(parts)
        # as a stream has it, so that both count the same tokens
        for index, piece in enumerate(completion.pieces, 1):
            last = index == len(completion.pieces)
            parts.push(piece, last, is_token=index <= len(completion.token_ids))
        counts = super()._count(completion)
        counts.reasoning_tokens = parts.reasoning_tokens
        return counts

    def _message(self, index: int, completion: Completion) -> dict[str, Any]:
        return self._whole[index].message()

    def _whole_delta(self, index: int, completion: Completion) -> dict[str, Any]:
        parts = self._whole[index]
        return _delta(parts.take_reasoning(), *parts.take(last=True), reasons=False, last=True)

    def _finish_reason(self, index: int, completion: Completion) -> str:
        return self._whole[index].finish_reason(completion.finish)

    # -- usage ----------------------------------------------------------------------------------------

    def _usage(self, counts: Sequence[Counts], prompt: int | None = None) -> dict[str, Any]:
        members = super()._usage(counts, prompt)
        if self._request.reasoning:
            tokens = sum(of_choice.reasoning_tokens for of_choice in counts)
            members["completion_tokens_details"] = {"reasoning_tokens": tokens}
        return members


def _delta(
    reasoning: str, content: str, entries: list[dict[str, Any]], reasons: bool, last: bool
) -> dict[str, Any]:
    """Parts without anything new are left out, but for one, so that every frame keeps the token cadence.

    `reasons`: what comes next may be reasoning, so that content would come too early.
    """
    delta: dict[str, Any] = {"role": "assistant"}
    if reasoning or (reasons and not last):
        delta["reasoning_content"] = reasoning
    if entries:
        delta["tool_calls"] = entries
    if content or last or len(delta) == 1:
        delta["content"] = content
    return delta
