"""The fields of a request that chat, text completions and vLLM's /generate read alike."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

from endpoint.declarations import Special, range_schema
from endpoint.protocols.base import ChatPrompt, GenerationRequest, ModelInfo, PromptList
from endpoint.protocols.common_fields import SEED
from endpoint.protocols.openai_members import (
    BEST_OF,
    CANDIDATES,
    FREQUENCY_PENALTY,
    IGNORE_EOS,
    IGNORED,
    INCLUDE_STOP,
    INCLUDE_USAGE,
    MAX_COMPLETION_TOKENS,
    MAX_TOKENS,
    MIN_P,
    MIN_TOKENS,
    MODEL,
    PRESENCE_PENALTY,
    PROMPT_LOGPROBS,
    REPETITION_PENALTY,
    SAMPLING,
    SKIP_SPECIAL,
    STOP,
    STOP_TOKEN_IDS,
    STOPS,
    STREAM,
    STREAM_OPTIONS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    USE_BEAM_SEARCH,
    N,
)
from endpoint.protocols.sampling import resolve_sampling
from endpoint.protocols.structured import FORMS, Grammar, read_grammar
from endpoint.validation import Fields, Range, show
from engine.errors import InvalidRequest
from engine.settings import ASYNC_SCHEDULING

_BIAS = Range(-100, 100)
_MAX_BIASES = 1024
_MAX_BEAM_TOKENS = 128
_ONE_BY_ONE = f"{ASYNC_SCHEDULING}=1 in the server's environment"
_BIAS_KEY = re.compile(r"[0-9]{1,10}")


class Candidates(NamedTuple):
    n: int  # choices returned
    branches: int  # choices generated

    @property
    def least_logprobs(self) -> int:
        """SamplingParams.logprobs, so that the candidates can be ranked."""
        return 0 if self.branches > self.n else -1


def _logit_bias(fields: Fields, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    biases = fields.object("logit_bias")
    if biases is None:
        return ()
    members = biases.body
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


LOGIT_BIAS = Special(
    "logit_bias",
    "Added to the logits of tokens, by their decimal ids.",
    _logit_bias,
    {
        "type": "object",
        "propertyNames": {"pattern": f"^{_BIAS_KEY.pattern}$"},
        "additionalProperties": {"type": "number", **range_schema(_BIAS)},
        "maxProperties": _MAX_BIASES,
    },
)


COMMON = (
    MODEL,
    STREAM,
    STREAM_OPTIONS,
    MAX_TOKENS,
    MAX_COMPLETION_TOKENS,
    *SAMPLING,
    MIN_P,
    MIN_TOKENS,
    LOGIT_BIAS,
    *CANDIDATES,
    USE_BEAM_SEARCH,
    *STOPS,
    PROMPT_LOGPROBS,
    *FORMS,
    *IGNORED,
)


def read_sampling(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """Arguments of `resolve_sampling`, as SAMPLING declares them."""
    return {
        "temperature": TEMPERATURE.read(fields),
        "top_k": TOP_K.read(fields),
        "top_p": TOP_P.read(fields),
        "seed": SEED.read(fields),
        "repetition_penalty": REPETITION_PENALTY.read(fields),
        "presence_penalty": PRESENCE_PENALTY.read(fields),
        "frequency_penalty": FREQUENCY_PENALTY.read(fields),
        "stop_token_ids": STOP_TOKEN_IDS.read(fields, model.vocab_size),
        "ignore_eos": IGNORE_EOS.read(fields),
    }


def read_stops(fields: Fields) -> dict[str, Any]:
    """Members of a GenerationRequest, as STOPS declares them."""
    stop = STOP.read(fields)
    include_stop = INCLUDE_STOP.read(fields)
    return {
        "stop": stop,
        "include_stop": include_stop and bool(stop or fields.raw("stop_token_ids")),
        "skip_special_tokens": SKIP_SPECIAL.read(fields),
    }


def read_candidates(fields: Fields, model: ModelInfo, *, best_of_streams: bool) -> Candidates:
    """`n` and `best_of`, and their rules with `temperature` and `stream`.

    `best_of_streams`: whether a stream may ask for more candidates than choices. They are not generated:
    what is sent at once cannot be ranked.
    """
    n = N.read_up_to(fields, model.max_n) or 1
    best_of = BEST_OF.read(fields)
    width = n if best_of is None else best_of
    if model.one_answer and max(n, width) > 1:
        raise fields.error("n" if n > 1 else "best_of", f"1 with {_ONE_BY_ONE}", "send a request for each")
    stream = fields.raw("stream") is True
    if stream and width != n and not best_of_streams:
        raise fields.error("best_of", f"equal to `n` = {n} when `stream` is true")
    if width < n:
        raise fields.error("best_of", f"at least `n` = {n}")
    if width > 1 and fields.raw("temperature") == 0:
        raise fields.error("temperature", "above 0 when `n` or `best_of` is above 1")
    return Candidates(n, n if stream else width)


def read_openai(
    fields: Fields,
    model: ModelInfo,
    prompt: str | tuple[int, ...] | ChatPrompt | PromptList,
    logprobs: int,
    *,
    echo: bool = False,
) -> GenerationRequest:
    """Check the fields both OpenAI endpoints have.

    `logprobs`: as in SamplingParams, read by the caller because the two endpoints spell it differently.
    """
    stream = STREAM.read(fields)
    INCLUDE_USAGE.read(STREAM_OPTIONS.read(fields))
    asked = read_sampling(fields, model)
    beam = USE_BEAM_SEARCH.read(fields)
    max_tokens = _max_tokens(fields, model, beam)
    stops = read_stops(fields)
    candidates = _beams(fields, model) if beam else read_candidates(fields, model, best_of_streams=False)
    steering = _steering(fields, model)
    prompt_logprobs = _prompt_logprobs(fields, stream)
    grammar = _grammar(fields, beam)
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
            sampling,
            beam_search=beam,
            logprobs=max(logprobs, candidates.least_logprobs),
            prompt_logprobs=max(prompt_logprobs, logprobs) if echo else prompt_logprobs,
            lora=MODEL.read(fields, model),
            grammar=grammar.text,
            **steering,
        ),
        stream=stream,
        n=candidates.n,
        echo=echo,
        grammar_field=grammar.field,
        **stops,
    )


def _beams(fields: Fields, model: ModelInfo) -> Candidates:
    if model.one_answer:
        raise fields.error("use_beam_search", f"false with {_ONE_BY_ONE}", "leave it out")
    BEST_OF.read(fields)  # without effect
    width = N.read_up_to(fields, model.max_n) or 1
    return Candidates(width, width)


def _max_tokens(fields: Fields, model: ModelInfo, beam: bool) -> int:
    name, max_tokens = MAX_COMPLETION_TOKENS.name, MAX_COMPLETION_TOKENS.read(fields)
    other = MAX_TOKENS.read(fields)  # checked even where it does not count
    if max_tokens is None:
        name, max_tokens = MAX_TOKENS.name, other
    if beam and max_tokens is not None and max_tokens > _MAX_BEAM_TOKENS:
        raise fields.error(name, f"at most {_MAX_BEAM_TOKENS} with `use_beam_search`", "lower it")
    if max_tokens is None:
        return min(model.max_iter_times, _MAX_BEAM_TOKENS) if beam else model.max_iter_times
    return max_tokens


def _steering(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    """Members of SamplingParams that steer the distribution beyond plain sampling."""
    return {
        "logit_bias": LOGIT_BIAS.read(fields, model),
        "min_p": MIN_P.read(fields) or 0.0,
        "min_tokens": MIN_TOKENS.read(fields) or 0,
    }


def _prompt_logprobs(fields: Fields, stream: bool) -> int:
    """SamplingParams.prompt_logprobs."""
    wanted = PROMPT_LOGPROBS.read(fields)
    if wanted is not None and stream:
        raise fields.error("prompt_logprobs", "left out when `stream` is true")
    return -1 if wanted is None else wanted


def _grammar(fields: Fields, beam: bool) -> Grammar:
    grammar = read_grammar(fields, FORMS)
    if grammar.text and beam:
        raise InvalidRequest(
            f"`{grammar.field}` gives the format of the answer, but must be left out with `use_beam_search`; "
            "leave one of them out"
        )
    return grammar
