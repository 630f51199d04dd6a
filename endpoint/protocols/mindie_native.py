"""POST /infer and POST /infer_token, MindIE's own dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from endpoint import sse
from endpoint.declarations import Flag, request_body
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
from endpoint.protocols.common_fields import DETAILS, text_prompt, token_prompt
from endpoint.protocols.parameters import (
    ADAPTER_ID,
    FINISH,
    SAMPLING,
    SCHEDULE,
    TOP_K,
    TOP_P,
    OneChoiceReply,
    parameters,
    read_sampling,
    read_schedule,
)
from endpoint.validation import MAX_PROMPT_TOKENS, Fields, Range
from engine.errors import InvalidRequest, ServerError

_INPUTS = text_prompt("inputs", required=False)
_INPUT_ID = token_prompt("input_id", Range(0, MAX_PROMPT_TOKENS), required=False)
_STREAM = Flag("stream", "Sends every token at once, as server-sent events.")
_PARAMETERS = parameters(*SAMPLING, TOP_K, TOP_P, *SCHEDULE, DETAILS, ADAPTER_ID)


class MindIENative:
    name = "mindie_native"
    family = "MindIE"
    routes = ("/infer", "/infer_token")
    body = request_body(
        "Generate from a text (`inputs`) or from token ids (`input_id`): one of the two.",
        _INPUTS,
        _INPUT_ID,
        _STREAM,
        _PARAMETERS,
        examples={
            "text": {"inputs": "My name is Olivier and I", "parameters": {"details": True}},
            "token ids": {"input_id": [5, 6, 7, 8], "parameters": {"max_new_tokens": 8, "details": True}},
            "stream": {"inputs": "My name is Olivier and I", "stream": True},
        },
    )

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        prompt = _prompt(fields, model.vocab_size)
        asked = _PARAMETERS.read(fields)
        DETAILS.read(asked)
        lora = ADAPTER_ID.read(asked, model)
        return GenerationRequest(
            prompt=prompt,
            sampling=read_sampling(asked, model, lora=lora),
            stream=_STREAM.read(fields),
            **read_schedule(asked),
        )

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        parameters = body.get("parameters") or {}
        return NativeReply(request.sampling.seed, parameters.get("details") is True, context.full_text_frames)


class NativeReply(OneChoiceReply):
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
            details = sse.dumps(self._detail_object(step.finish, step.num_tokens))
            return sse.frame(
                f'{times}"generated_text":{sse.json_text(step.full_text)},"details":{details},'
                f'"token":{{"id":[{step.shown_id}],"text":null}}}}'
            )
        text = sse.json_text(step.full_text if self._full_text_frames else step.text)
        return sse.frame(f'{times}"token":{{"id":[{step.shown_id}],"text":{text}}}}}')

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return (sse.frame(error_text(error)),)

    def result(self, completions: Sequence[Completion]) -> bytes:
        completion = completions[0]
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
        return _INPUT_ID.read(fields, vocab_size)
    if text is None:
        raise fields.error("inputs", "a non-empty string or an array of text parts", "send it, or `input_id`")
    return _INPUTS.read(fields)
