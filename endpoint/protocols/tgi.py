"""POST /generate with `inputs`, /generate_stream and /, as Hugging Face's server has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from endpoint import sse
from endpoint.http_errors import error_text
from endpoint.protocols.base import (
    Body,
    Completion,
    GenerationRequest,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenStep,
)
from endpoint.protocols.parameters import (
    FINISH,
    OneChoiceReply,
    check_adapter,
    parameters_of,
    read_sampling,
    text_prompt,
)
from endpoint.validation import COUNT, PENALTY, Fields, stop_strings
from engine.errors import ServerError

_MAX_STOP_UNITS = 1024
_MAX_STOPS = 1024


class _TGI:
    """The body and the answer are the same on all three routes; they differ in when they stream."""

    name: ClassVar[str]
    routes: ClassVar[tuple[str, ...]]
    in_list: ClassVar[bool] = False  # whether a whole answer stands in an array

    def claims(self, body: Body) -> bool:
        return True

    def _streams(self, fields: Fields) -> bool:
        return False

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        prompt = text_prompt(fields, "inputs")
        stream = self._streams(fields)
        parameters = parameters_of(fields)
        parameters.boolean("details")
        parameters.boolean("return_full_text")
        if parameters.flag("decoder_input_details") and stream:
            raise parameters.error("decoder_input_details", "false in a stream")
        check_adapter(parameters, model)
        return GenerationRequest(
            prompt=prompt,
            sampling=read_sampling(
                parameters, model, frequency_penalty=parameters.number("frequency_penalty", PENALTY)
            ),
            stream=stream,
            stop=stop_strings(parameters, _MAX_STOP_UNITS, _MAX_STOPS),
            keep_last=parameters.integer("truncate", COUNT),
        )

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return TGIReply(request.sampling.seed, body.get("parameters") or {}, context, self.in_list)


class TGIGenerate(_TGI):
    name = "tgi_generate"
    routes = ("/generate",)


class TGIGenerateStream(_TGI):
    name = "tgi_generate_stream"
    routes = ("/generate_stream",)

    def _streams(self, fields: Fields) -> bool:
        return True


class TGIRoot(_TGI):
    name = "tgi_root"
    routes = ("/",)
    in_list = True

    def _streams(self, fields: Fields) -> bool:
        return fields.flag("stream")


class TGIReply(OneChoiceReply):
    def __init__(
        self, seed: int, parameters: Mapping[str, Any], context: ReplyContext, in_list: bool = False
    ) -> None:
        self._seed = seed
        self._prefill = parameters.get("decoder_input_details") is True
        self._details = self._prefill or parameters.get("details") is True
        self._before_text = f"{context.prompt_text} " if parameters.get("return_full_text") is True else ""
        self._context = context
        self._in_list = in_list

    def frame(self, step: TokenStep) -> bytes:
        text = step.full_text if self._context.full_text_frames else step.text
        token = (
            f'{{"token":{{"id":[{step.token_id}],"text":{sse.json_text(text)},"logprob":null,"special":null}}'
        )
        if step.finish is None:
            return sse.frame(f'{token},"generated_text":null,"details":null}}')
        whole = sse.json_text(self._before_text + step.full_text)
        details = None
        if self._details:
            details = {
                "prompt_tokens": self._context.prompt_tokens,
                "finish_reason": FINISH[step.finish],
                "generated_tokens": step.index + 1,
                "seed": self._seed,
            }
        return sse.frame(f'{token},"generated_text":{whole},"details":{sse.dumps(details)}}}')

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return (sse.frame(error_text(error)),)

    def result(self, completions: Sequence[Completion]) -> bytes:
        completion = completions[0]
        answer: dict[str, Any] = {}
        if self._details:
            answer["details"] = {
                "prompt_tokens": self._context.prompt_tokens,
                "finish_reason": FINISH[completion.finish],
                "generated_tokens": len(completion.token_ids),
                "prefill": _tokens(self._context.prompt_ids) if self._prefill else [],
                "seed": self._seed,
                "tokens": _tokens(completion.token_ids),
            }
        answer["generated_text"] = self._before_text + completion.text
        return sse.dumps([answer] if self._in_list else answer).encode()


def _tokens(ids: Sequence[int]) -> list[dict[str, Any]]:
    return [{"id": token_id, "logprob": None, "special": None, "text": None} for token_id in ids]
