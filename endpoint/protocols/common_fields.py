"""Declarations that several dialects share, and the JSON Schemas of prompts and stops."""

from __future__ import annotations

from endpoint import validation
from endpoint.declarations import Boolean, Integer, Json, Number, Special
from endpoint.validation import (
    MAX_PROMPT_TOKENS,
    MAX_STOP_ITEM_UNITS,
    MAX_STOP_UNITS,
    Fields,
    Range,
    checked_prompt_text,
    joined_text,
    stop_strings,
    token_ids,
)

NON_EMPTY: Json = {"type": "string", "minLength": 1}
TEXT_PARTS: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
TOKEN_IDS: Json = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_PROMPT_TOKENS,
    "items": {"type": "integer", "minimum": 0},
}

SEED = Integer(
    "seed",
    "Where the random numbers start: the same request with the same seed gives the same tokens.",
    validation.SEED,
    default="random",
)
DO_SAMPLE = Boolean(
    "do_sample",
    "true draws tokens, false takes the most likely one whatever else is set.",
    default="true when temperature, top_k or top_p is sent, else as the model's generation_config.json",
)
TYPICAL_P = Number("typical_p", "Checked, otherwise ignored.", validation.UNIT_ABOVE_ZERO)
WATERMARK = Boolean("watermark", "Checked, otherwise ignored.")
DETAILS = Boolean("details", "Adds finish reason and counts to the answer.", default=False)


def text_prompt(name: str, *, required: bool = True) -> Special[[Fields], str]:
    """A string or text parts, not empty."""

    def read(fields: Fields) -> str:
        value = fields.raw(name)
        if value is None:
            raise fields.error(name, "a non-empty string or an array of text parts", "send a prompt")
        return checked_prompt_text(fields, name, joined_text(value, name))

    meaning = "The prompt: a text, or text parts, which are joined without separator."
    return Special(name, meaning, read, {"anyOf": [NON_EMPTY, TEXT_PARTS]}, required=required)


def token_prompt(
    name: str, legal: Range | None = None, *, required: bool = True
) -> Special[[Fields, int], tuple[int, ...]]:
    """Token ids; the vocabulary's size is given when they are read."""

    def read(fields: Fields, vocab_size: int) -> tuple[int, ...]:
        return token_ids(fields, name, vocab_size, legal)

    meaning = "The prompt as token ids, each below the model's vocabulary size."
    return Special(name, meaning, read, TOKEN_IDS, required=required)


def stop(max_units: int = MAX_STOP_UNITS, max_items: int | None = None) -> Special[[Fields], tuple[str, ...]]:
    """`max_units`: of a string sent alone. `max_items`: of a list."""

    def read(fields: Fields) -> tuple[str, ...]:
        return stop_strings(fields, max_units, max_items)

    strings: Json = {"type": "array", "items": {**NON_EMPTY, "maxLength": MAX_STOP_ITEM_UNITS}}
    if max_items is not None:
        strings["maxItems"] = max_items
    return Special(
        "stop",
        f"Ends the answer where one of these texts appears; in all at most {MAX_STOP_UNITS} UTF-16 units.",
        read,
        {"anyOf": [{**NON_EMPTY, "maxLength": max_units}, strings]},
    )
