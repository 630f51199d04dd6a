"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from endpoint.protocols.base import (
    Body,
    Completion,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenStep,
)
from endpoint.protocols.openai_common import FINISH, ChunkParts, OpenAIReply, check_model, parse_common
from endpoint.validation import Fields, Range, checked_prompt_text, token_ids

_LOGPROBS = Range(0, 5)


class OpenAICompletions:
    name = "openai_completions"
    routes = ("/v1/completions",)

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        check_model(fields, model)
        suffix = fields.raw("suffix")
        if suffix is not None and not isinstance(suffix, str):
            raise fields.error("suffix", "a string")
        unsupported = {
            "logprobs": fields.integer("logprobs", _LOGPROBS) is not None,
            "echo": fields.flag("echo"),
            "suffix": bool(suffix),
        }
        return parse_common(fields, model, _prompt(fields, model.vocab_size), unsupported)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return CompletionsReply(body, context)


class CompletionsReply(OpenAIReply):
    chunk_object = "text_completion"
    result_object = "text_completion"

    def _chunk_parts(self) -> ChunkParts:
        return ChunkParts('{"index":0,"text":', ',"logprobs":null,"stop_reason":null,')

    def _finish_members(self, step: TokenStep, text: str) -> dict[str, Any]:
        return {"choices": [_choice(text, step.stop_reason, step.finish)]}

    def _choice(self, completion: Completion) -> dict[str, Any]:
        return _choice(completion.text, completion.stop_reason, completion.finish)


def _choice(text: str, stop_reason: str | int | None, finish: FinishReason | None) -> dict[str, Any]:
    return {
        "index": 0,
        "text": text,
        "logprobs": None,
        "stop_reason": stop_reason,
        "finish_reason": FINISH[finish] if finish else None,
    }


def _prompt(fields: Fields, vocab_size: int) -> str | tuple[int, ...]:
    value = fields.raw("prompt")
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        # a list of prompts; a list of one is one prompt
        if len(value) > 1:
            raise fields.unsupported("prompt", "send one prompt per request")
        fields, value = Fields({"prompt": value[0]}), value[0]
    if isinstance(value, str):
        return checked_prompt_text(fields, "prompt", value)
    if isinstance(value, list):
        return token_ids(fields, "prompt", vocab_size)
    raise fields.error("prompt", "a non-empty string or a non-empty array of token ids", "send a prompt")
