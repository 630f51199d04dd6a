"""The fields of a request that chat, text completions and vLLM's /generate read alike."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

from endpoint.protocols.base import ChatPrompt, GenerationRequest, ModelInfo
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
from engine.errors import InvalidRequest

_TOP_K = Range(-1, COUNT.high)
_REPETITION = Range(0, 2, low_open=True)
_BEST_OF = Range(1, 128)
_PROMPT_LOGPROBS = Range(0, 20)
_BIAS = Range(-100, 100)
_MAX_BIASES = 1024
_MAX_BEAM_TOKENS = 128
_BIAS_KEY = re.compile(r"[0-9]{1,10}")
_MAX_SCHEMA_NAME = 64


class Candidates(NamedTuple):
    n: int  # choices returned
    branches: int  # choices generated

    @property
    def least_logprobs(self) -> int:
        """SamplingParams.logprobs, so that the candidates can be ranked."""
        return 0 if self.branches > self.n else -1


def check_model(fields: Fields, model: ModelInfo) -> None:
    if fields.raw("model") != model.name:
        raise fields.error("model", f"{show(model.name)}, the loaded model", "see GET /v1/models")


def read_sampling(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """Arguments of `resolve_sampling`."""
    return {
        "temperature": fields.number("temperature", NOT_NEGATIVE),
        "top_k": fields.integer("top_k", _TOP_K),
        "top_p": fields.number("top_p", UNIT_ABOVE_ZERO),
        "seed": fields.integer("seed", SEED),
        "repetition_penalty": fields.number("repetition_penalty", _REPETITION),
        "presence_penalty": fields.number("presence_penalty", PENALTY),
        "frequency_penalty": fields.number("frequency_penalty", PENALTY),
        "stop_token_ids": stop_token_ids(fields, model.vocab_size),
        "ignore_eos": fields.flag("ignore_eos"),
    }


def read_stops(fields: Fields) -> dict[str, Any]:
    """Members of a GenerationRequest."""
    stop = stop_strings(fields)
    include_stop = fields.flag("include_stop_str_in_output")
    return {
        "stop": stop,
        "include_stop": include_stop and bool(stop or fields.raw("stop_token_ids")),
        "skip_special_tokens": fields.flag("skip_special_tokens", True),
    }


def read_candidates(fields: Fields, model: ModelInfo, *, best_of_streams: bool) -> Candidates:
    """`n` and `best_of`, and their rules with `temperature` and `stream`.

    `best_of_streams`: whether a stream may ask for more candidates than choices. They are not generated:
    what is sent at once cannot be ranked.
    """
    n = fields.integer("n", Range(1, model.max_n)) or 1
    best_of = fields.integer("best_of", _BEST_OF)
    width = n if best_of is None else best_of
    stream = fields.raw("stream") is True
    if stream and width != n and not best_of_streams:
        raise fields.error("best_of", f"equal to `n` = {n} when `stream` is true")
    if width < n:
        raise fields.error("best_of", f"at least `n` = {n}")
    if width > 1 and fields.raw("temperature") == 0:
        raise fields.error("temperature", "above 0 when `n` or `best_of` is above 1")
    return Candidates(n, n if stream else width)


_NOT_WITH_BEAMS: dict[str, object] = {
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "min_p": 0,
    "min_tokens": 0,
}


def read_openai(
    fields: Fields, model: ModelInfo, prompt: str | tuple[int, ...] | ChatPrompt, logprobs: int
) -> GenerationRequest:
    """Check the fields both OpenAI endpoints have.

    `logprobs`: as in SamplingParams, read by the caller because the two endpoints spell it differently.
    """
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    if options is not None:
        options.boolean("include_usage")
    asked = read_sampling(fields, model)
    beam = fields.flag("use_beam_search")
    max_tokens = _max_tokens(fields, model, beam)
    stops = read_stops(fields)
    candidates = _beams(fields, model) if beam else read_candidates(fields, model, best_of_streams=False)
    steering = _steering(fields, model)
    _refuse_unserved(fields, beam)
    sampling = resolve_sampling(
        model,
        max_tokens=max_tokens,
        branches=candidates.branches,
        do_sample=False if beam else None,
        **asked,
    )
    steering["min_tokens"] = min(steering["min_tokens"], sampling.max_tokens)
    return GenerationRequest(
        prompt=prompt,
        sampling=replace(
            sampling, beam_search=beam, logprobs=max(logprobs, candidates.least_logprobs), **steering
        ),
        stream=stream,
        n=candidates.n,
        **stops,
    )


def _beams(fields: Fields, model: ModelInfo) -> Candidates:
    """Beams are ranked by the model's own probabilities, so what would change those is refused."""
    for name, neutral in _NOT_WITH_BEAMS.items():
        if fields.raw(name) not in (None, neutral):
            raise fields.error(name, f"{neutral} with `use_beam_search`", "leave it out")
    fields.integer("best_of", _BEST_OF)  # without effect
    width = fields.integer("n", Range(1, model.max_n)) or 1
    return Candidates(width, width)


def _max_tokens(fields: Fields, model: ModelInfo, beam: bool) -> int:
    asked = {name: fields.integer(name, COUNT) for name in ("max_completion_tokens", "max_tokens")}
    name = "max_tokens" if asked["max_completion_tokens"] is None else "max_completion_tokens"
    max_tokens = asked[name]
    if beam and max_tokens is not None and max_tokens > _MAX_BEAM_TOKENS:
        raise fields.error(name, f"at most {_MAX_BEAM_TOKENS} with `use_beam_search`", "lower it")
    if max_tokens is None:
        return min(model.max_iter_times, _MAX_BEAM_TOKENS) if beam else model.max_iter_times
    return max_tokens


def _steering(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """Members of SamplingParams that steer the distribution beyond plain sampling."""
    return {
        "logit_bias": _logit_bias(fields, model),
        "min_p": fields.number("min_p", UNIT) or 0.0,
        "min_tokens": fields.integer("min_tokens", NOT_NEGATIVE) or 0,
    }


def _logit_bias(fields: Fields, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    biases = fields.object("logit_bias")
    if biases is None:
        return ()
    members = biases.members()
    if len(members) > _MAX_BIASES:
        raise fields.error("logit_bias", f"an object of at most {_MAX_BIASES} members")
    by_id: dict[int, float] = {}
    for key in members:
        if not _BIAS_KEY.fullmatch(key) or int(key) >= model.vocab_size:
            raise InvalidRequest(
                f"`logit_bias` has the member {show(key)}, but its names must be decimal token ids in "
                f"[0, {model.vocab_size - 1}]; correct it or leave it out"
            )
        bias = biases.number(key, _BIAS)
        if bias is None:
            raise biases.error(key, f"a number {_BIAS}")
        by_id[int(key)] = bias
    return tuple(by_id.items())


def _refuse_unserved(fields: Fields, beam: bool) -> None:
    prompt_logprobs = fields.integer("prompt_logprobs", _PROMPT_LOGPROBS)
    constrained = _constrains_format(fields)
    if constrained and beam:
        raise fields.error("response_format", 'left out or {"type": "text"} with `use_beam_search`')
    refuse_unsupported(
        fields, {"prompt_logprobs": prompt_logprobs is not None, "response_format": constrained}
    )


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
