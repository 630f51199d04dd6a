"""What the dialects with a `parameters` object share: TGI, Triton and MindIE's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from endpoint.protocols.base import Completion, FinishReason, ModelInfo
from endpoint.protocols.sampling import resolve_sampling
from endpoint.validation import (
    COUNT,
    POSITIVE,
    SEED,
    UNIT_ABOVE_ZERO,
    UNIT_OPEN,
    Fields,
    Range,
    checked_prompt_text,
    joined_text,
    show,
)
from engine.errors import EngineBug
from engine.sampling_params import SamplingParams

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
_ADAPTER_ID = re.compile(r"[A-Za-z0-9_./-]{1,256}")


def parameters_of(fields: Fields) -> Fields:
    return fields.object("parameters") or Fields({}, "parameters.")


def text_prompt(fields: Fields, name: str) -> str:
    """A string or text parts, not empty."""
    value = fields.raw(name)
    if value is None:
        raise fields.error(name, "a non-empty string or an array of text parts", "send a prompt")
    return checked_prompt_text(fields, name, joined_text(value, name))


def read_sampling(
    parameters: Fields,
    model: ModelInfo,
    *,
    top_k: Range = COUNT,
    top_p: Range = UNIT_OPEN,
    frequency_penalty: float | None = None,
) -> SamplingParams:
    """The sampling fields, whose ranges differ between the dialects only where the arguments say so."""
    new_tokens = parameters.integer("max_new_tokens", COUNT)
    parameters.number("typical_p", UNIT_ABOVE_ZERO)
    parameters.boolean("watermark")
    return resolve_sampling(
        model,
        max_tokens=_DEFAULT_NEW_TOKENS if new_tokens is None else new_tokens,
        do_sample=parameters.boolean("do_sample"),
        temperature=parameters.number("temperature", POSITIVE),
        top_k=parameters.integer("top_k", top_k),
        top_p=parameters.number("top_p", top_p),
        seed=parameters.integer("seed", SEED),
        repetition_penalty=parameters.number("repetition_penalty", POSITIVE),
        frequency_penalty=frequency_penalty,
    )


def read_schedule(parameters: Fields) -> dict[str, Any]:
    """Members of a GenerationRequest."""
    priority = parameters.integer("priority", _PRIORITY)
    return {
        "priority": _LAST_PRIORITY if priority is None else priority,
        "timeout_s": parameters.integer("timeout", _TIMEOUT_S),
    }


def check_adapter(parameters: Fields, model: ModelInfo) -> None:
    value = parameters.raw("adapter_id")
    if value in (None, "None", model.name):
        return
    if not isinstance(value, str) or not _ADAPTER_ID.fullmatch(value):
        raise parameters.error("adapter_id", "1 to 256 letters, digits or any of _ . / -")
    raise parameters.error("adapter_id", f'"None" or {show(model.name)}, as no adapter is loaded')


class OneChoiceReply:
    """The parts of a Reply that are alike where there is one choice and no terminator."""

    def tail(self) -> Sequence[bytes]:
        return ()

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        raise EngineBug("this dialect has no beam search")
