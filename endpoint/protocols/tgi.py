"""POST /generate with `inputs`, /generate_stream and /, as Hugging Face's server has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from endpoint import sse
from endpoint.declarations import Flag, Integer, Number, RequestBody, ignored, request_body
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
from endpoint.protocols.common_fields import DETAILS, stop, text_prompt
from endpoint.protocols.parameters import (
    ADAPTER_ID,
    FINISH,
    SAMPLING,
    TOP_K,
    TOP_P,
    OneChoiceReply,
    parameters,
    read_sampling,
)
from endpoint.validation import COUNT, PENALTY, Fields
from engine.errors import ServerError

_INPUTS = text_prompt("inputs")
_STREAM = Flag("stream", "Sends every token at once, as server-sent events.")
_FULL_TEXT = Flag("return_full_text", "Puts the prompt and a space before the text.")
_PROMPT_DETAILS = Flag("decoder_input_details", "As `details`, with the prompt's tokens; not in a stream.")
_FREQUENCY = Number("frequency_penalty", "Taken from a token's logit each time it was used.", PENALTY)
_STOP = stop(max_units=1024, max_items=1024)
_TRUNCATE = Integer("truncate", "Keeps only so many tokens at the prompt's end.", COUNT, default="all")
_PARAMETERS = parameters(
    *SAMPLING,
    TOP_K,
    TOP_P,
    _FREQUENCY,
    _STOP,
    _TRUNCATE,
    _FULL_TEXT,
    DETAILS,
    _PROMPT_DETAILS,
    ADAPTER_ID,
    *ignored("best_of", "top_n_tokens", "grammar", "ignore_eos"),
)
_EXAMPLES = {
    "short": {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 16}},
    "sampled": {
        "inputs": "Once upon a time",
        "parameters": {"max_new_tokens": 16, "temperature": 0.8, "top_p": 0.95, "seed": 7, "details": True},
    },
}


class _TGI:
    """The body and the answer are the same on all three routes; they differ in when they stream."""

    name: ClassVar[str]
    family = "TGI"
    routes: ClassVar[tuple[str, ...]]
    body: ClassVar[RequestBody]
    in_list: ClassVar[bool] = False  # whether a whole answer stands in an array

    def claims(self, body: Body) -> bool:
        return True

    def _streams(self, fields: Fields) -> bool:
        return False

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        prompt = _INPUTS.read(fields)
        stream = self._streams(fields)
        asked = _PARAMETERS.read(fields)
        DETAILS.read(asked)
        _FULL_TEXT.read(asked)
        if _PROMPT_DETAILS.read(asked) and stream:
            raise asked.error("decoder_input_details", "false in a stream")
        lora = ADAPTER_ID.read(asked, model)
        sampling = read_sampling(asked, model, frequency_penalty=_FREQUENCY.read(asked), lora=lora)
        return GenerationRequest(
            prompt=prompt,
            sampling=sampling,
            stream=stream,
            stop=_STOP.read(asked),
            keep_last=_TRUNCATE.read(asked),
        )

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return TGIReply(request.sampling.seed, body.get("parameters") or {}, context, self.in_list)


class TGIGenerate(_TGI):
    name = "tgi_generate"
    routes = ("/generate",)
    body = request_body(
        "Generate text: a body with `inputs`.", _INPUTS, _PARAMETERS, ignored("stream"), examples=_EXAMPLES
    )


class TGIGenerateStream(_TGI):
    name = "tgi_generate_stream"
    routes = ("/generate_stream",)
    body = request_body(
        "Generate text, streamed.", _INPUTS, _PARAMETERS, ignored("stream"), examples=_EXAMPLES
    )

    def _streams(self, fields: Fields) -> bool:
        return True


class TGIRoot(_TGI):
    name = "tgi_root"
    routes = ("/",)
    body = request_body(
        "Generate text, streamed or as a list of one.", _INPUTS, _PARAMETERS, _STREAM, examples=_EXAMPLES
    )
    in_list = True

    def _streams(self, fields: Fields) -> bool:
        return _STREAM.read(fields)


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
            f'{{"token":{{"id":[{step.shown_id}],"text":{sse.json_text(text)},"logprob":null,"special":null}}'
        )
        if step.finish is None:
            return sse.frame(f'{token},"generated_text":null,"details":null}}')
        whole = sse.json_text(self._before_text + step.full_text)
        details = None
        if self._details:
            details = {
                "prompt_tokens": self._context.prompt_tokens,
                "finish_reason": FINISH[step.finish],
                "generated_tokens": step.num_tokens,
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
