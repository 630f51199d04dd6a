"""POST /infer and POST /infer_token, MindIE's own dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from endpoint import sse
from endpoint.http_errors import error_text
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
from endpoint.protocols.sampling import resolve_sampling
from endpoint.validation import (
    COUNT,
    MAX_PROMPT_TOKENS,
    POSITIVE,
    SEED,
    UNIT_ABOVE_ZERO,
    UNIT_OPEN,
    Fields,
    Range,
    checked_prompt_text,
    joined_text,
    show,
    token_ids,
)
from engine.errors import InvalidRequest, ServerError

FINISH: dict[FinishReason, str] = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "stop_sequence",
}

_DEFAULT_NEW_TOKENS = 20
_LAST_PRIORITY = 5
_PRIORITY = Range(1, _LAST_PRIORITY)
_TIMEOUT_S = Range(1, 65535)
_INPUT_ID = Range(0, MAX_PROMPT_TOKENS)
_ADAPTER_ID = re.compile(r"[A-Za-z0-9_./-]{1,256}")


class MindIENative:
    name = "mindie_native"
    routes = ("/infer", "/infer_token")

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        prompt = _prompt(fields, model.vocab_size)
        stream = fields.flag("stream")
        parameters = fields.object("parameters") or Fields({}, "parameters.")
        new_tokens = parameters.integer("max_new_tokens", COUNT)
        parameters.number("typical_p", UNIT_ABOVE_ZERO)
        parameters.boolean("watermark")
        parameters.boolean("details")
        _check_adapter(parameters, model)
        priority = parameters.integer("priority", _PRIORITY)
        return GenerationRequest(
            prompt=prompt,
            sampling=resolve_sampling(
                model,
                max_tokens=_DEFAULT_NEW_TOKENS if new_tokens is None else new_tokens,
                do_sample=parameters.boolean("do_sample"),
                temperature=parameters.number("temperature", POSITIVE),
                top_k=parameters.integer("top_k", COUNT),
                top_p=parameters.number("top_p", UNIT_OPEN),
                seed=parameters.integer("seed", SEED),
                repetition_penalty=parameters.number("repetition_penalty", POSITIVE),
            ),
            stream=stream,
            priority=_LAST_PRIORITY if priority is None else priority,
            timeout_s=parameters.integer("timeout", _TIMEOUT_S),
        )

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        parameters = body.get("parameters") or {}
        return NativeReply(request.sampling.seed, parameters.get("details") is True, context.full_text_frames)


class NativeReply:
    def __init__(self, seed: int, details: bool, full_text_frames: bool) -> None:
        self._seed = seed
        self._details = details
        self._full_text_frames = full_text_frames

    def frame(self, step: TokenStep) -> bytes:
        latency = f"{step.latency_ms:.2f}"
        if step.index == 0:
            times = f'{{"prefill_time":{latency},"decode_time":null,'
        else:
            times = f'{{"prefill_time":null,"decode_time":{latency},'
        if step.finish is not None:
            # the last piece of text is in generated_text only
            details = sse.dumps(self._detail_object(step.finish, step.index + 1))
            return sse.frame(
                f'{times}"generated_text":{sse.json_text(step.full_text)},"details":{details},'
                f'"token":{{"id":[{step.token_id}],"text":null}}}}'
            )
        text = sse.json_text(step.full_text if self._full_text_frames else step.text)
        return sse.frame(f'{times}"token":{{"id":[{step.token_id}],"text":{text}}}}}')

    def tail(self) -> Sequence[bytes]:
        return ()

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return (sse.frame(error_text(error)),)

    def result(self, completion: Completion) -> bytes:
        answer: dict[str, Any] = {"generated_text": completion.text}
        details = self._detail_object(completion.finish, len(completion.token_ids))
        if details is not None:
            answer["details"] = details
        return sse.dumps(answer).encode()

    def _detail_object(self, finish: FinishReason, generated_tokens: int) -> dict[str, Any] | None:
        if not self._details:
            return None
        return {"finish_reason": FINISH[finish], "generated_tokens": generated_tokens, "seed": self._seed}


def _prompt(fields: Fields, vocab_size: int) -> str | tuple[int, ...]:
    text, ids = fields.raw("inputs"), fields.raw("input_id")
    if text is not None and ids is not None:
        raise InvalidRequest("`inputs` and `input_id` are both there; send one of them")
    if ids is not None:
        return token_ids(fields, "input_id", vocab_size, _INPUT_ID)
    if text is None:
        raise fields.error("inputs", "a non-empty string or an array of text parts", "send it, or `input_id`")
    return checked_prompt_text(fields, "inputs", joined_text(text, "inputs"))


def _check_adapter(parameters: Fields, model: ModelInfo) -> None:
    value = parameters.raw("adapter_id")
    if value in (None, "None", model.name):
        return
    if not isinstance(value, str) or not _ADAPTER_ID.fullmatch(value):
        raise parameters.error("adapter_id", "1 to 256 letters, digits or any of _ . / -")
    raise parameters.error("adapter_id", f'"None" or {show(model.name)}, as no adapter is loaded')
