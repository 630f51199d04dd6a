"""What the text of one chat choice is made of: reasoning, content and tool calls."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from endpoint.protocols.base import ChatPrompt, FinishReason, GenerationRequest, ReplyContext
from endpoint.protocols.openai_reply import FINISH
from endpoint.reasoning import ReasoningSplitter
from endpoint.tools.base import Delta, Kind
from endpoint.tools.registry import FORMATS


@dataclass(slots=True)
class _Call:
    name: str
    source: str  # what the model wrote before the arguments
    arguments: list[str] = field(default_factory=list)
    complete: bool = False
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(4)}")

    def head(self, index: int) -> dict[str, Any]:
        function = {"name": self.name, "arguments": ""}
        return {"index": index, "id": self.id, "type": "function", "function": function}


class ChatParts:
    """The parts of one choice, as its text grows. They are taken frame by frame, or all at the end."""

    def __init__(self, request: GenerationRequest, context: ReplyContext, most_calls: int | None) -> None:
        """`most_calls`: how many are delivered; None for all."""
        tools = isinstance(request.prompt, ChatPrompt) and request.prompt.tools
        self._splitter = ReasoningSplitter(context.opening) if request.reasoning else None
        self._parser = FORMATS[context.model.chat.tools].make_parser() if tools else None
        self._most_calls = most_calls
        self._calls: list[_Call] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []  # of the whole answer, in which a call that broke off is text
        self._waiting: deque[Delta] = deque()  # not taken yet
        self._waiting_reasoning = ""
        self._num_begun = 0  # calls whose beginning was taken

    def push(self, text: str, last: bool = False, is_token: bool = True) -> None:
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text, last, is_token)
            self._waiting_reasoning += reasoning
            self._reasoning.append(reasoning)
        deltas = [Delta(Kind.TEXT, text, text)] if self._parser is None else self._parser.push(text, last)
        for delta in deltas:
            self._note(delta)
        self._waiting.extend(deltas)

    def _note(self, delta: Delta) -> None:
        match delta.kind:
            case Kind.TEXT:
                self._content.append(delta.text)
            case Kind.CALL:
                self._calls.append(_Call(delta.text, delta.source))
            case Kind.ARGUMENTS:
                self._calls[-1].arguments.append(delta.text)
            case Kind.END:
                self._calls[-1].complete = True
            case Kind.BROKEN:
                self._content += [self._calls[-1].source, *self._calls[-1].arguments]

    # -- the whole ------------------------------------------------------------------------------------

    @property
    def reasons(self) -> bool:
        """Whether reasoning is told apart, and what comes next may be some."""
        return self._splitter is not None and not self._splitter.done

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._splitter is None else self._splitter.tokens

    def finish_reason(self, finish: FinishReason) -> str:
        cut_off = finish is FinishReason.LENGTH and self._parser is not None and self._parser.inside
        called = any(call.complete for call in self._delivered)
        return "tool_calls" if called and not cut_off else FINISH[finish]

    def message(self) -> dict[str, Any]:
        """Of an answer that is not streamed; its calls are those that are complete."""
        message = {"role": "assistant", "content": "".join(self._content)}
        if self._splitter is not None:
            message["reasoning_content"] = "".join(self._reasoning)
        return {**message, "tool_calls": self._whole_calls()}

    def _whole_calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.arguments)},
            }
            for call in self._delivered
            if call.complete
        ]

    @property
    def _delivered(self) -> Sequence[_Call]:
        return self._calls[: self._most_calls]

    # -- in frames ------------------------------------------------------------------------------------

    def take_reasoning(self) -> str:
        taken, self._waiting_reasoning = self._waiting_reasoning, ""
        return taken

    def take(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Content and entries of `tool_calls` for the next frame; all that waits when it is the `last`.

        Any other has one entry at most, as some clients look at the first only. The one with a call's name
        has no arguments yet.
        """
        content: list[str] = []
        entries: list[dict[str, Any]] = []
        while self._waiting:
            if entries and not last and self._waiting[0].kind in (Kind.TEXT, Kind.CALL):
                break
            delta = self._waiting.popleft()
            if delta.kind is Kind.TEXT:
                content.append(delta.text)
            elif delta.kind is Kind.CALL:
                self._num_begun += 1
                if self._is_delivered:
                    entries.append(self._calls[self._num_begun - 1].head(self._num_begun - 1))
                    if not last:
                        break
            elif delta.kind is Kind.ARGUMENTS and self._is_delivered:
                self._add_arguments(entries, delta.text)
        return "".join(content), entries

    @property
    def _is_delivered(self) -> bool:
        return self._most_calls is None or self._num_begun <= self._most_calls

    def _add_arguments(self, entries: list[dict[str, Any]], piece: str) -> None:
        """Append a piece of the arguments of the call begun last."""
        index = self._num_begun - 1
        if not entries or entries[-1]["index"] != index:
            entries.append({"index": index, "function": {"arguments": ""}})
        entries[-1]["function"]["arguments"] += piece
