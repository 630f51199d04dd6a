"""POST /v2/models/{model}/generate, /generate_stream and /infer, as Triton has them; and stopInfer's body."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from endpoint import sse
from endpoint.declarations import (
    Boolean,
    Integer,
    Json,
    Number,
    Object,
    Single,
    Special,
    range_schema,
    request_body,
)
from endpoint.http_errors import error_text
from endpoint.models_api import check_served
from endpoint.protocols.base import (
    NO_TOKEN,
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
    FINISH,
    SAMPLING,
    SCHEDULE,
    OneChoiceReply,
    parameters,
    read_sampling,
    read_schedule,
)
from endpoint.validation import COUNT, MAX_INT32, MAX_PROMPT_TOKENS, UNIT_ABOVE_ZERO, Fields, Range
from engine.errors import ServerError

MODEL_PATH = "/v2/models/{model:[A-Za-z0-9_.-]+}"

_ID_CHARACTERS = re.compile(r"[A-Za-z0-9_-]{1,256}")
_STOP_CHARACTERS = re.compile(r"[A-Za-z0-9._:-]{1,256}")
_MAX_NAME = 256
_TENSOR_LENGTH = Range(1, MAX_PROMPT_TOKENS)
_DEFAULT_OUTPUT = "output0"


def _read_id(fields: Fields) -> str | None:
    value = fields.raw("id")
    if value is None:
        return None
    if not isinstance(value, str) or not _ID_CHARACTERS.fullmatch(value):
        raise fields.error("id", "a string of 1 to 256 letters, digits, `_` or `-`")
    return value


def _read_stop_id(fields: Fields) -> str:
    """What a request can be called: by `id`, or by the headers req-id and RequestUUID."""
    value = fields.raw("id")
    if not isinstance(value, str) or not _STOP_CHARACTERS.fullmatch(value):
        raise fields.error(
            "id", "the id of a running request, 1 to 256 letters, digits or any of _ - . :", "send it"
        )
    return value


def _read_name(tensor: Fields) -> str:
    value = tensor.raw("name")
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise tensor.error("name", f"a string of at most {_MAX_NAME} characters", "send it")
    return value


def _read_length(tensor: Fields) -> int:
    shape = tensor.array("shape") or []
    if all(type(size) is int for size in shape):  # true and 1.0 equal 1
        match shape:
            case [length] | [1, length] if length in _TENSOR_LENGTH:
                return int(length)
    raise tensor.error("shape", f"[n] or [1, n] with n {_TENSOR_LENGTH}", "send the shape of `data`")


def _check_datatype(tensor: Fields) -> None:
    if tensor.raw("datatype") != "UINT32":
        raise tensor.error("datatype", '"UINT32"', "send token ids")


_ID_SCHEMA: Json = {"type": "string", "pattern": f"^{_ID_CHARACTERS.pattern}$"}
_ID = Special(
    "id", "Name of the request: echoed, and taken by stopInfer.", _read_id, _ID_SCHEMA, default="random"
)
_TEXT_INPUT = text_prompt("text_input")
_TOP_K = Integer(
    "top_k",
    "Draws from so many of the most likely tokens; 0 is off.",
    Range(0, MAX_INT32),
    default="the model's own, else off",
)
_TOP_P = Number(
    "top_p",
    "Draws from the most likely tokens that together have this probability.",
    UNIT_ABOVE_ZERO,
    default="the model's own, else 1.0",
)
_PERF_STAT = Boolean("perf_stat", "With `details`: token ids and their times in ms.", default=False)
_BATCH_SIZE = Integer("batch_size", "Checked, otherwise ignored.", COUNT)
_PARAMETERS = parameters(*SAMPLING, _TOP_K, _TOP_P, *SCHEDULE, DETAILS, _PERF_STAT, _BATCH_SIZE)
_STOP_ID = Special(
    "id",
    "Name of the request: its `id`, or what its header req-id or its answer's RequestUUID says.",
    _read_stop_id,
    {"type": "string", "pattern": f"^{_STOP_CHARACTERS.pattern}$"},
    required=True,
)

_NAME_SCHEMA: Json = {"type": "string", "maxLength": _MAX_NAME}
_NAME = Special("name", "Any name.", _read_name, _NAME_SCHEMA, required=True)
_SHAPE = Special(
    "shape",
    "[n] or [1, n] for n token ids.",
    _read_length,
    {
        "type": "array",
        "minItems": 1,
        "maxItems": 2,
        "items": {"type": "integer", **range_schema(_TENSOR_LENGTH)},
    },
    required=True,
)
_DATATYPE = Special("datatype", "Type of `data`.", _check_datatype, {"const": "UINT32"}, required=True)
_DATA = token_prompt("data")
_TENSOR_PARAMETERS = Object("parameters", "As at the top, and used when there are none.", _PARAMETERS.members)
_INPUTS = Single("inputs", "The prompt.", (_NAME, _SHAPE, _DATATYPE, _DATA, _TENSOR_PARAMETERS))
_OUTPUT_NAME = Special("name", "Echoed; an empty one gives output0.", _read_name, _NAME_SCHEMA, required=True)
_OUTPUTS = Single("outputs", "What to call the answer.", (_OUTPUT_NAME,))


class TritonGenerate:
    name = "triton_generate"
    family = "Triton"
    routes: tuple[str, ...] = (f"{MODEL_PATH}/generate",)
    body = request_body(
        "Generate text, answered as a whole.",
        _ID,
        _TEXT_INPUT,
        _PARAMETERS,
        DETAILS,
        examples={
            "short": {"id": "a123", "text_input": "My name is Olivier and I"},
            "details": {
                "text_input": "My name is Olivier and I",
                "parameters": {"max_new_tokens": 16, "details": True, "perf_stat": True, "priority": 1},
            },
        },
    )
    stream = False

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        check_served(model, path["model"])
        fields = Fields(body)
        client_id = _client_id(fields)
        prompt = _TEXT_INPUT.read(fields)
        DETAILS.read(fields)
        return _request(prompt, client_id, _PARAMETERS.read(fields), model, stream=self.stream)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return TextReply(request.client_id or "", body, context)


class TritonGenerateStream(TritonGenerate):
    name = "triton_generate_stream"
    routes = (f"{MODEL_PATH}/generate_stream",)
    body = replace(TritonGenerate.body, meaning="Generate text, streamed.")
    stream = True


class TritonInfer:
    name = "triton_infer"
    family = "Triton"
    routes = (f"{MODEL_PATH}/infer",)
    body = request_body(
        "Generate from token ids, answered as token ids.",
        _ID,
        _INPUTS,
        _OUTPUTS,
        _PARAMETERS,
        examples={
            "token ids": {
                "id": "a123",
                "inputs": [{"name": "input0", "shape": [1, 4], "datatype": "UINT32", "data": [5, 6, 7, 8]}],
                "outputs": [{"name": "output0"}],
                "parameters": {"max_new_tokens": 8},
            }
        },
    )

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        check_served(model, path["model"])
        fields = Fields(body)
        client_id = _client_id(fields)
        tensor = _INPUTS.read(fields)
        prompt = _tensor_ids(tensor, model.vocab_size)
        _output_name(fields)
        top, inner = _PARAMETERS.read(fields), _TENSOR_PARAMETERS.read(tensor)
        if top.body and inner.body:
            _read_parameters(inner, model)  # what is wrong is refused even where it does not count
        return _request(prompt, client_id, top if top.body else inner, model, stream=False)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return TensorReply(request.client_id or "", _output_name(Fields(body)))


STOP_INFER_BODY = request_body("End a running request.", _STOP_ID, examples={"stop": {"id": "a123"}})


def stop_infer_id(body: Body) -> str:
    """The id of the request that POST .../stopInfer is to end. Raises InvalidRequest."""
    return _STOP_ID.read(Fields(body))


class TextReply(OneChoiceReply):
    def __init__(self, client_id: str, body: Body, context: ReplyContext) -> None:
        parameters = body.get("parameters") or {}
        self._details = body.get("details") is True or parameters.get("details") is True
        self._perf_stat = parameters.get("perf_stat") is True
        self._full_text_frames = context.full_text_frames
        head = {"id": client_id, "model_name": context.model.name, "model_version": None}
        self._head = f'{sse.dumps(head)[:-1]},"text_output":'
        self._perf: list[list[int]] = []

    def frame(self, step: TokenStep) -> bytes:
        latency = round(step.latency_ms)
        parts = [self._head, sse.json_text(step.full_text if self._full_text_frames else step.text)]
        if self._details:
            if step.token_id != NO_TOKEN:
                self._perf.append([step.token_id, latency])
            details = self._detail_object(step.finish, step.num_tokens, self._perf)
            details |= {"batch_size": step.batch_size, "queue_wait_time": step.queue_wait_us}
            parts.append(f',"details":{sse.dumps(details)}')
        prefill, decode = (latency, "null") if step.index == 0 else ("null", latency)
        parts.append(f',"prefill_time":{prefill},"decode_time":{decode}}}')
        return _frame("".join(parts))

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return (_frame(error_text(error)),)

    def result(self, completions: Sequence[Completion]) -> bytes:
        completion = completions[0]
        answer = self._head + sse.json_text(completion.text)
        if self._details:
            pairs = zip(completion.token_ids, completion.latencies_ms, strict=True)
            perf = [[token_id, round(ms)] for token_id, ms in pairs]
            details = self._detail_object(completion.finish, len(completion.token_ids), perf)
            details |= {"batch_size": completion.batch_sizes, "queue_wait_time": completion.queue_waits_us}
            answer += f',"details":{sse.dumps(details)}'
        return f"{answer}}}".encode()

    def _detail_object(
        self, finish: FinishReason | None, generated_tokens: int, perf: list[list[int]]
    ) -> dict[str, Any]:
        """`perf`: [token id, ms] of every token so far."""
        return {
            **({} if finish is None else {"finish_reason": FINISH[finish]}),
            "generated_tokens": generated_tokens,
            "first_token_cost": None,
            "decode_cost": None,
            **({"perf_stat": perf} if self._perf_stat else {}),
        }


class TensorReply(OneChoiceReply):
    """/infer: token ids, never streamed."""

    def __init__(self, client_id: str, output_name: str) -> None:
        self._id = client_id
        self._output_name = output_name

    def frame(self, step: TokenStep) -> bytes:
        return b""

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return ()

    def result(self, completions: Sequence[Completion]) -> bytes:
        ids = completions[0].token_ids
        output = {"name": self._output_name, "shape": [1, len(ids)], "datatype": "UINT32", "data": ids}
        return sse.dumps({"id": self._id, "outputs": [output]}).encode()


def _frame(body: str) -> bytes:
    # without a space, unlike everywhere else
    return f"data:{body}\n\n".encode()


def _request(
    prompt: str | tuple[int, ...], client_id: str, asked: Fields, model: ModelInfo, *, stream: bool
) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt, stream=stream, client_id=client_id, **_read_parameters(asked, model)
    )


def _read_parameters(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """Members of a GenerationRequest."""
    DETAILS.read(fields)
    _PERF_STAT.read(fields)
    _BATCH_SIZE.read(fields)
    sampling = read_sampling(fields, model, top_k=_TOP_K, top_p=_TOP_P)
    return {"sampling": sampling, **read_schedule(fields)}


def _client_id(fields: Fields) -> str:
    return _ID.read(fields) or secrets.token_hex(16)


def _output_name(fields: Fields) -> str:
    return _OUTPUT_NAME.read(_OUTPUTS.read(fields)) or _DEFAULT_OUTPUT


def _tensor_ids(tensor: Fields, vocab_size: int) -> tuple[int, ...]:
    _NAME.read(tensor)
    length = _SHAPE.read(tensor)
    _DATATYPE.read(tensor)
    data = tensor.array("data") or []
    if len(data) != length:
        raise tensor.error("data", f"an array of {length} token ids, as `shape` says", "correct one of them")
    return _DATA.read(tensor, vocab_size)
