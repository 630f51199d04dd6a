"""POST /v2/models/{model}/generate, /generate_stream and /infer, as Triton has them; and stopInfer's body."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from endpoint import sse
from endpoint.http_errors import error_text
from endpoint.models_api import check_served
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
from endpoint.protocols.parameters import (
    FINISH,
    OneChoiceReply,
    parameters_of,
    read_sampling,
    read_schedule,
    text_prompt,
)
from endpoint.validation import (
    COUNT,
    MAX_INT32,
    MAX_PROMPT_TOKENS,
    UNIT_ABOVE_ZERO,
    Fields,
    Range,
    objects,
    token_ids,
)
from engine.errors import ServerError

MODEL_PATH = "/v2/models/{model:[A-Za-z0-9_.-]+}"

_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
_TOP_K = Range(0, MAX_INT32)
_MAX_NAME = 256
_TENSOR_LENGTH = Range(1, MAX_PROMPT_TOKENS)
_DEFAULT_OUTPUT = "output0"


class TritonGenerate:
    name = "triton_generate"
    routes = (f"{MODEL_PATH}/generate",)
    stream = False

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        check_served(model, path["model"])
        fields = Fields(body)
        client_id = _client_id(fields)
        prompt = text_prompt(fields, "text_input")
        fields.boolean("details")
        return _request(prompt, client_id, parameters_of(fields), model, stream=self.stream)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return TextReply(request.client_id or "", body, context)


class TritonGenerateStream(TritonGenerate):
    name = "triton_generate_stream"
    routes = (f"{MODEL_PATH}/generate_stream",)
    stream = True


class TritonInfer:
    name = "triton_infer"
    routes = (f"{MODEL_PATH}/infer",)

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        check_served(model, path["model"])
        fields = Fields(body)
        client_id = _client_id(fields)
        tensor = _only(fields, "inputs")
        prompt = _tensor_ids(tensor, model.vocab_size)
        _output_name(fields)
        top, inner = parameters_of(fields), parameters_of(tensor)
        return _request(prompt, client_id, top if top.members() else inner, model, stream=False)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return TensorReply(request.client_id or "", _output_name(Fields(body)))


def stop_infer_id(body: Body) -> str:
    """The id of the request that POST .../stopInfer is to end. Raises InvalidRequest."""
    fields = Fields(body)
    client_id = _checked_id(fields)
    if client_id is None:
        raise fields.error("id", "the id of a running request", "send it")
    return client_id


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
            self._perf.append([step.token_id, latency])
            details = self._detail_object(step.finish, step.index + 1, self._perf)
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
    prompt: str | tuple[int, ...], client_id: str, parameters: Fields, model: ModelInfo, *, stream: bool
) -> GenerationRequest:
    parameters.boolean("details")
    parameters.boolean("perf_stat")
    parameters.integer("batch_size", COUNT)
    return GenerationRequest(
        prompt=prompt,
        sampling=read_sampling(parameters, model, top_k=_TOP_K, top_p=UNIT_ABOVE_ZERO),
        stream=stream,
        client_id=client_id,
        **read_schedule(parameters),
    )


def _checked_id(fields: Fields) -> str | None:
    value = fields.raw("id")
    if value is None:
        return None
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise fields.error("id", "a string of 1 to 256 letters, digits, `_` or `-`")
    return value


def _client_id(fields: Fields) -> str:
    return _checked_id(fields) or secrets.token_hex(16)


def _only(fields: Fields, name: str) -> Fields:
    """The one object of an array."""
    value = fields.array(name)
    if value is None or len(value) != 1:
        raise fields.error(name, "an array of one object", "send one")
    return Fields(objects(value, name)[0], f"{name}[0].")


def _name(tensor: Fields) -> str:
    value = tensor.raw("name")
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise tensor.error("name", f"a string of at most {_MAX_NAME} characters", "send it")
    return value


def _output_name(fields: Fields) -> str:
    return _name(_only(fields, "outputs")) or _DEFAULT_OUTPUT


def _tensor_ids(tensor: Fields, vocab_size: int) -> tuple[int, ...]:
    _name(tensor)
    length = _length(tensor)
    if tensor.raw("datatype") != "UINT32":
        raise tensor.error("datatype", '"UINT32"', "send token ids")
    data = tensor.array("data") or []
    if len(data) != length:
        raise tensor.error("data", f"an array of {length} token ids, as `shape` says", "correct one of them")
    return token_ids(tensor, "data", vocab_size)


def _length(tensor: Fields) -> int:
    shape = tensor.array("shape") or []
    if all(type(size) is int for size in shape):  # true and 1.0 equal 1
        match shape:
            case [length] | [1, length] if length in _TENSOR_LENGTH:
                return int(length)
    raise tensor.error("shape", f"[n] or [1, n] with n {_TENSOR_LENGTH}", "send the shape of `data`")
