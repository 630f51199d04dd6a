"""The answer of POST /v1/chat/completions, whole or in frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from endpoint import sse
from endpoint.protocols.base import (
    Body,
    Completion,
    GenerationRequest,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.protocols.openai_reply import FINISH, OpenAIReply, prompt_logprobs


class ChatReply(OpenAIReply):
    chunk_object = "chat.completion.chunk"
    result_object = "chat.completion"

    def __init__(self, request: GenerationRequest, body: Body, context: ReplyContext, logprobs: int) -> None:
        """`logprobs`: -1 when not asked for, else how many of the most likely tokens."""
        super().__init__(request, body, context)
        self._logprobs = logprobs

    # The role is in every delta, and there is no frame with the role alone: the first frame is what clients
    # take for the first token.

    def _unfinished_choice(self, step: TokenStep, text: str) -> str:
        return (
            f'{{"index":{step.choice},"delta":{{"role":"assistant","content":{sse.json_text(text)}}},'
            f'"logprobs":{self._step_logprobs_json(step)},"finish_reason":null}}'
        )

    def _last_choice(self, step: TokenStep, text: str) -> dict[str, Any]:
        return {
            "index": step.choice,
            "delta": {"role": "assistant", "content": text},
            "logprobs": self._step_logprobs(step),
            "finish_reason": FINISH[step.finish] if step.finish else None,
        }

    def _last_members(self, step: TokenStep) -> dict[str, Any]:
        return {"full_text": step.full_text} if self._context.full_text_frames else {}

    def _whole_choices(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": self._message(index, completion),
                "logprobs": self._all_logprobs(completion),
                "finish_reason": self._finish_reason(index, completion),
            }
            for index, completion in enumerate(completions)
        ]

    # Of whole choices: their message, their only delta, and how they ended.

    def _message(self, index: int, completion: Completion) -> dict[str, Any]:
        return {"role": "assistant", "content": completion.text, "tool_calls": []}

    def _whole_delta(self, index: int, completion: Completion) -> dict[str, Any]:
        return {"role": "assistant", "content": completion.text}

    def _finish_reason(self, index: int, completion: Completion) -> str:
        return FINISH[completion.finish]

    def _timings(self, completion: Completion) -> dict[str, Any]:
        rounded = [round(ms, 2) for ms in completion.latencies_ms]
        members: dict[str, Any] = {
            "prefill_time": rounded[0] if rounded else None,
            "decode_time_arr": rounded[1:],
        }
        if self._prompt_logprobs is not None:
            members["prompt_logprobs"] = prompt_logprobs(completion.prompt, self._prompt_logprobs)
        return members

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        self._note_whole(completions)
        return [self._beam_frame(index, completion) for index, completion in enumerate(completions)]

    def _beam_frame(self, index: int, completion: Completion) -> bytes:
        delta = self._whole_delta(index, completion)
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._all_logprobs(completion),
            "finish_reason": self._finish_reason(index, completion),
        }
        members = {**self._usage_member([self._counts[index]]), "choices": [choice]}
        if self._context.full_text_frames:
            members["full_text"] = delta["content"]
        return self._chunk(members)

    def _step_logprobs_json(self, step: TokenStep) -> str:
        return "null" if step.logprob is None else sse.dumps(self._step_logprobs(step))

    def _step_logprobs(self, step: TokenStep) -> dict[str, Any] | None:
        if self._logprobs < 0 or step.logprob is None:
            return None
        return {"content": [self._entry(step.logprob, step.top_logprobs)]}

    def _all_logprobs(self, completion: Completion) -> dict[str, Any] | None:
        if self._logprobs < 0:
            return None
        pairs = zip(completion.logprobs, completion.top_logprobs, strict=True)
        return {"content": [self._entry(token, top) for token, top in pairs]}

    def _entry(self, token: TokenLogprob, top: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {**_logprob(token), "top_logprobs": [_logprob(other) for other in top[: self._logprobs]]}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
