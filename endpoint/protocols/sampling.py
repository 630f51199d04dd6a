"""Sampling defaults: the request first, then the model's generation_config.json, then the standard values."""

from __future__ import annotations

import secrets

from endpoint.protocols.base import ModelInfo
from endpoint.validation import NOT_NEGATIVE, POSITIVE, UNIT_ABOVE_ZERO, Range
from engine.sampling_params import SamplingParams

_TOP_K_CAP = 1000  # of models whose generation config names no top_k
_REPETITION = Range(1e-6, 1e6)  # beyond, logits leave the range of float32
_MIN_TEMPERATURE = 1e-3  # below it logits / temperature leaves the range of float16


def _model_default(model: ModelInfo, name: str, legal: Range, standard: float) -> float:
    """A number of generation_config.json, or `standard` where the file has none that is usable."""
    value = model.generation_defaults.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and value in legal:
        return value
    return standard


def resolve_sampling(
    model: ModelInfo,
    *,
    max_tokens: int,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    branches: int = 1,
    lora: str = "",
) -> SamplingParams:
    """Fill in what a checked request left open; None = not sent. top_k -1 and 0 both mean off.

    A top_k above the model's cap is lowered to it.
    """
    if do_sample is None:
        asked = branches > 1 or any(value is not None for value in (temperature, top_k, top_p))
        do_sample = asked or model.generation_defaults.get("do_sample") is True
    if temperature == 0:
        do_sample = False

    if repetition_penalty is None:
        repetition_penalty = _model_default(model, "repetition_penalty", POSITIVE, 1.0)
    if do_sample:
        model_top_k = int(_model_default(model, "top_k", NOT_NEGATIVE, 0))
        if temperature is None:
            temperature = _model_default(model, "temperature", POSITIVE, 1.0)
        if top_p is None:
            top_p = _model_default(model, "top_p", UNIT_ABOVE_ZERO, 1.0)
        if top_k is None:
            top_k = model_top_k
        temperature = max(temperature, _MIN_TEMPERATURE)
        top_k = min(max(top_k, 0), model_top_k or _TOP_K_CAP, model.vocab_size)
    return SamplingParams(
        max_tokens=min(max_tokens, model.max_iter_times),
        temperature=float(temperature or 0.0) if do_sample else 0.0,
        top_k=(top_k or 0) if do_sample else 0,
        top_p=float(top_p or 1.0) if do_sample else 1.0,
        seed=secrets.randbits(63) if seed is None else seed,
        repetition_penalty=min(max(float(repetition_penalty), _REPETITION.low), _REPETITION.high),
        presence_penalty=presence_penalty or 0.0,
        frequency_penalty=frequency_penalty or 0.0,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        branches=branches,
        lora=lora,
        reproducible=seed is not None,
    )
