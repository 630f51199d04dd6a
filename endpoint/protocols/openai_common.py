"""What chat and text completions share: the fields of a request, usage, and the frames of a stream."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from endpoint import sse
from endpoint.http_errors import error_text
from endpoint.protocols.base import (
    Body,
    ChatPrompt,
    Completion,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    ReplyContext,
    TokenStep,
)
from endpoint.protocols.sampling import resolve_sampling
from endpoint.validation import (
    COUNT,
    NOT_NEGATIVE,
    PENALTY,
    SEED,
    UNIT,
    UNIT_ABOVE_ZERO,
    Fields,
    Range,
    refuse_unsupported,
    show,
    stop_strings,
    stop_token_ids,
)
from engine.errors import InvalidRequest, ServerError

FINISH: dict[FinishReason, str] = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "stop",
}

_TOP_K = Range(-1, COUNT.high)
_REPETITION = Range(0, 2, low_open=True)
_BEST_OF = Range(1, 128)
_LOGPROBS = Range(0, 20)
_BIAS = Range(-100, 100)
_MAX_BIASES = 1024
_MAX_BEAM_TOKENS = 128
_BIAS_KEY = re.compile(r"[0-9]{1,10}")
_MAX_SCHEMA_NAME = 64


def check_model(fields: Fields, model: ModelInfo) -> None:
    if fields.raw("model") != model.name:
        raise fields.error("model", f"{show(model.name)}, the loaded model", "see GET /v1/models")


def parse_common(
    fields: Fields,
    model: ModelInfo,
    prompt: str | tuple[int, ...] | ChatPrompt,
    unsupported: Mapping[str, bool],
) -> GenerationRequest:
    """Check the fields both endpoints have.

    `unsupported`: the caller's own fields that this build cannot honour, and whether each is in use.
    """
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    if options is not None:
        options.boolean("include_usage")
    max_tokens = fields.integer("max_tokens", COUNT)
    max_completion_tokens = fields.integer("max_completion_tokens", COUNT)
    asked_tokens = max_tokens if max_completion_tokens is None else max_completion_tokens
    temperature = fields.number("temperature", NOT_NEGATIVE)
    top_k = fields.integer("top_k", _TOP_K)
    top_p = fields.number("top_p", UNIT_ABOVE_ZERO)
    seed = fields.integer("seed", SEED)
    repetition_penalty = fields.number("repetition_penalty", _REPETITION)
    presence_penalty = fields.number("presence_penalty", PENALTY)
    frequency_penalty = fields.number("frequency_penalty", PENALTY)
    stop = stop_strings(fields)
    stop_ids = stop_token_ids(fields, model.vocab_size)
    include_stop = fields.flag("include_stop_str_in_output")
    skip_special_tokens = fields.flag("skip_special_tokens", True)
    ignore_eos = fields.flag("ignore_eos")
    refuse_unsupported(
        fields,
        {
            **_candidates(fields, model, stream, temperature, asked_tokens),
            **_constraints(fields),
            **unsupported,
        },
    )
    return GenerationRequest(
        prompt=prompt,
        sampling=resolve_sampling(
            model,
            max_tokens=model.max_iter_times if asked_tokens is None else asked_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop_token_ids=stop_ids,
            ignore_eos=ignore_eos,
        ),
        stream=stream,
        stop=stop,
        include_stop=include_stop and bool(stop or stop_ids),
        skip_special_tokens=skip_special_tokens,
    )


def _candidates(
    fields: Fields, model: ModelInfo, stream: bool, temperature: float | None, max_tokens: int | None
) -> dict[str, bool]:
    """n, best_of and use_beam_search: which of them ask for more than one sequence."""
    n = fields.integer("n", Range(1, model.max_n)) or 1
    best_of = fields.integer("best_of", _BEST_OF)
    beam = fields.flag("use_beam_search")
    width = n if best_of is None else best_of
    if beam:
        if max_tokens is not None and max_tokens > _MAX_BEAM_TOKENS:
            raise fields.error("max_tokens", f"at most {_MAX_BEAM_TOKENS} with `use_beam_search`", "lower it")
    elif stream and width != n:
        raise fields.error("best_of", f"equal to `n` = {n} when `stream` is true")
    elif width < n:
        raise fields.error("best_of", f"at least `n` = {n}")
    elif width > 1 and temperature == 0:
        raise fields.error("temperature", "above 0 when `n` or `best_of` is above 1")
    return {"n": n > 1, "best_of": width > 1 and best_of is not None, "use_beam_search": beam}


def _constraints(fields: Fields) -> dict[str, bool]:
    """Fields that steer or inspect the distribution beyond plain sampling."""
    min_p = fields.number("min_p", UNIT)
    min_tokens = fields.integer("min_tokens", NOT_NEGATIVE)
    prompt_logprobs = fields.integer("prompt_logprobs", _LOGPROBS)
    return {
        "min_p": bool(min_p),
        "min_tokens": bool(min_tokens),
        "prompt_logprobs": prompt_logprobs is not None,
        "logit_bias": _has_logit_bias(fields),
        "response_format": _constrains_format(fields),
    }


def _has_logit_bias(fields: Fields) -> bool:
    biases = fields.object("logit_bias")
    if biases is None:
        return False
    members = biases.members()
    if len(members) > _MAX_BIASES:
        raise fields.error("logit_bias", f"an object of at most {_MAX_BIASES} members")
    for key in members:
        if not _BIAS_KEY.fullmatch(key):
            raise InvalidRequest(
                f"`logit_bias` has the member {show(key)}; its names must be decimal token ids"
            )
        if biases.number(key, _BIAS) is None:
            raise biases.error(key, f"a number {_BIAS}")
    return bool(members)


def _constrains_format(fields: Fields) -> bool:
    wanted = fields.object("response_format")
    if wanted is None:
        return False
    kind = wanted.raw("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise wanted.error("type", '"text", "json_object" or "json_schema"')
    if kind == "json_schema":
        schema = wanted.object("json_schema")
        if schema is None:
            raise wanted.error("json_schema", "an object with `name` and `schema`")
        name = schema.text("name")
        if name is None or len(name) > _MAX_SCHEMA_NAME:
            raise schema.error("name", f"a string of 1 to {_MAX_SCHEMA_NAME} characters")
        if schema.object("schema") is None:
            raise schema.error("schema", "an object")
    return bool(kind != "text")


def usage(prompt_tokens: int, batch_sizes: list[int], queue_waits_us: list[int]) -> dict[str, Any]:
    """The usage object; one entry of each list per generated token."""
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": len(batch_sizes),
        "total_tokens": prompt_tokens + len(batch_sizes),
        "batch_size": batch_sizes,
        "queue_wait_time": queue_waits_us,
    }


@dataclass(frozen=True, slots=True)
class ChunkParts:
    """The constant text around what changes from frame to frame: choices[0] of an unfinished chunk."""

    before_text: str
    after_text: str


class OpenAIReply(ABC):
    """Frames and result of one request with one choice; the subclasses know the shape of a choice."""

    chunk_object: ClassVar[str]
    result_object: ClassVar[str]

    def __init__(self, body: Body, context: ReplyContext) -> None:
        options = body.get("stream_options") or {}
        self._include_usage: bool = options.get("include_usage") is True
        self._context = context
        self._batch_sizes: list[int] = []
        self._queue_waits_us: list[int] = []
        self._chunk_head = self._head(self.chunk_object)
        parts = self._chunk_parts()
        self._before = f'data: {self._chunk_head},"choices":[{parts.before_text}'
        self._after = f'{parts.after_text}"finish_reason":null}}]}}\n\n'

    @abstractmethod
    def _chunk_parts(self) -> ChunkParts:
        """`after_text` ends where `"finish_reason"` begins."""

    @abstractmethod
    def _finish_members(self, step: TokenStep, text: str) -> dict[str, Any]:
        """The members of the last frame that follow the head, `usage` aside."""

    @abstractmethod
    def _choice(self, completion: Completion) -> dict[str, Any]:
        """choices[0] of a whole answer."""

    def _timings(self, completion: Completion) -> dict[str, Any]:
        return {}

    def _head(self, kind: str) -> str:
        model = self._context.model
        # the wall clock may be set back while the server runs
        created = max(int(time.time()), model.created)
        number = self._context.request_number
        return (
            f'{{"id":"endpoint_common_{number}","object":"{kind}","created":{created},'
            f'"model":{sse.json_text(model.name)}'
        )

    def _members(self, members: dict[str, Any]) -> str:
        """`members` as the continuation of an object whose head is written already."""
        return sse.dumps(members)[1:]

    def _usage(self) -> dict[str, Any]:
        return usage(self._context.prompt_tokens, self._batch_sizes, self._queue_waits_us)

    def frame(self, step: TokenStep) -> bytes:
        self._batch_sizes.append(step.batch_size)
        self._queue_waits_us.append(step.queue_wait_us)
        text = step.full_text if self._context.full_text_frames else step.text
        if step.finish is None:
            return f"{self._before}{sse.json_text(text)}{self._after}".encode()
        # with include_usage the totals follow in their own frame: clients add up every usage they see
        members = {} if self._include_usage else {"usage": self._usage()}
        members |= self._finish_members(step, text)
        return sse.frame(f"{self._chunk_head},{self._members(members)}")

    def tail(self) -> Sequence[bytes]:
        if not self._include_usage:
            return (sse.DONE,)
        totals = self._members({"choices": [], "usage": self._usage()})
        return sse.frame(f"{self._chunk_head},{totals}"), sse.DONE

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return sse.frame(error_text(error)), sse.DONE

    def result(self, completion: Completion) -> bytes:
        members = {
            "choices": [self._choice(completion)],
            "usage": usage(self._context.prompt_tokens, completion.batch_sizes, completion.queue_waits_us),
            **self._timings(completion),
        }
        return f"{self._head(self.result_object)},{self._members(members)}".encode()
