"""What the dialects with a `parameters` object share: TGI, Triton and MindIE's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from endpoint.declarations import Declaration, Integer, Number, Object, Special
from endpoint.protocols.adapter_choice import ADAPTER_PATTERN, adapter_of_id
from endpoint.protocols.base import Completion, FinishReason, ModelInfo
from endpoint.protocols.common_fields import DO_SAMPLE, SEED, TYPICAL_P, WATERMARK
from endpoint.protocols.sampling import resolve_sampling
from endpoint.validation import COUNT, POSITIVE, UNIT_OPEN, Fields, Range
from engine.errors import EngineBug
from engine.sampling_params import SamplingParams

FINISH: dict[FinishReason, str] = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "stop_sequence",
}

_NEW_TOKENS = Integer(
    "max_new_tokens",
    "Most tokens to generate; lowered to what the configuration and the context length allow.",
    COUNT,
    default=20,
)
_TEMPERATURE = Number("temperature", "Divides the logits.", POSITIVE, default="the model's own, else 1.0")
_REPETITION = Number(
    "repetition_penalty",
    "Makes tokens of the prompt and the answer less likely; 1.0 changes nothing.",
    POSITIVE,
    default="the model's own, else 1.0",
)
TOP_K = Integer(
    "top_k", "Draws from so many of the most likely tokens.", COUNT, default="the model's own, else off"
)
TOP_P = Number(
    "top_p",
    "Draws from the most likely tokens that together have this probability.",
    UNIT_OPEN,
    default="the model's own, else off",
)
PRIORITY = Integer("priority", "1 is served first.", Range(1, 5), default=5)
TIMEOUT = Integer(
    "timeout",
    "Longest wait between two tokens in seconds.",
    Range(1, 65535),
    default="tokenTimeout of the configuration",
)
ADAPTER_ID = Special(
    "adapter_id",
    "LoRA adapter to use; the model's own name or None means the model itself.",
    adapter_of_id,
    {"type": "string", "pattern": f"^{ADAPTER_PATTERN.pattern}$"},
    default="None",
)

SAMPLING = (_NEW_TOKENS, DO_SAMPLE, _TEMPERATURE, SEED, _REPETITION, TYPICAL_P, WATERMARK)
SCHEDULE = (PRIORITY, TIMEOUT)


def parameters(*members: Declaration) -> Object:
    return Object("parameters", "How to generate.", members)


def read_sampling(
    fields: Fields,
    model: ModelInfo,
    *,
    top_k: Integer = TOP_K,
    top_p: Number = TOP_P,
    frequency_penalty: float | None = None,
    lora: str = "",
) -> SamplingParams:
    """SAMPLING, `top_k` and `top_p`, whose ranges differ between the dialects."""
    new_tokens = _NEW_TOKENS.filled(fields)
    TYPICAL_P.read(fields)
    WATERMARK.read(fields)
    return resolve_sampling(
        model,
        max_tokens=new_tokens,
        do_sample=DO_SAMPLE.read(fields),
        temperature=_TEMPERATURE.read(fields),
        top_k=top_k.read(fields),
        top_p=top_p.read(fields),
        seed=SEED.read(fields),
        repetition_penalty=_REPETITION.read(fields),
        frequency_penalty=frequency_penalty,
        lora=lora,
    )


def read_schedule(fields: Fields) -> dict[str, Any]:
    """Members of a GenerationRequest."""
    return {"priority": PRIORITY.filled(fields), "timeout_s": TIMEOUT.read(fields)}


class OneChoiceReply:
    """The parts of a Reply that are alike where there is one choice and no terminator."""

    is_sse = True

    def tail(self) -> Sequence[bytes]:
        return ()

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        raise EngineBug("this dialect has no beam search")
