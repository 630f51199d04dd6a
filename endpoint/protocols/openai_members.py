"""Declarations of what chat, text completions and vLLM's /generate have in common."""

from __future__ import annotations

from endpoint.declarations import Flag, Integer, Number, Object, Special, ignored
from endpoint.protocols.adapter_choice import adapter_of_model
from endpoint.protocols.common_fields import NON_EMPTY, SEED, stop
from endpoint.validation import (
    COUNT,
    NOT_NEGATIVE,
    PENALTY,
    UNIT,
    UNIT_ABOVE_ZERO,
    Range,
    stop_token_ids,
)

MODEL = Special(
    "model", "Name of the served model or of a loaded adapter.", adapter_of_model, NON_EMPTY, required=True
)

MAX_TOKENS = Integer(
    "max_tokens",
    "Most tokens to generate; lowered to what the configuration and the context length allow.",
    COUNT,
    default="maxIterTimes of the configuration",
)
MAX_COMPLETION_TOKENS = Integer(
    "max_completion_tokens", "As `max_tokens`, and wins over it.", COUNT, default="max_tokens"
)
TEMPERATURE = Number(
    "temperature",
    "Divides the logits; 0 takes the most likely token every time.",
    NOT_NEGATIVE,
    default="the model's own, else 1.0",
)
TOP_K = Integer(
    "top_k",
    "Draws from so many of the most likely tokens; 0 and -1 are off.",
    Range(-1, COUNT.high),
    default="the model's own, else off",
)
TOP_P = Number(
    "top_p",
    "Draws from the most likely tokens that together have this probability.",
    UNIT_ABOVE_ZERO,
    default="the model's own, else 1.0",
)
MIN_P = Number("min_p", "Drops tokens less likely than this share of the most likely one.", UNIT, default=0.0)
REPETITION_PENALTY = Number(
    "repetition_penalty",
    "Makes tokens of the prompt and the answer less likely; 1.0 changes nothing.",
    Range(0, 2, low_open=True),
    default="the model's own, else 1.0",
)
PRESENCE_PENALTY = Number(
    "presence_penalty", "Taken once from the logit of every token already used.", PENALTY, default=0.0
)
FREQUENCY_PENALTY = Number(
    "frequency_penalty", "Taken from a token's logit each time it was used.", PENALTY, default=0.0
)
IGNORE_EOS = Flag("ignore_eos", "Goes on after the model's end token.")
MIN_TOKENS = Integer("min_tokens", "Does not end before so many tokens.", NOT_NEGATIVE, default=0)
N = Integer("n", "How many answers; at most maxN of the configuration.", Range(1), default=1)
BEST_OF = Integer(
    "best_of", "Generates so many answers, at least `n`, and returns the best.", Range(1, 128), default="n"
)
USE_BEAM_SEARCH = Flag("use_beam_search", "Searches with `n` beams instead of drawing; at most 128 tokens.")
PROMPT_LOGPROBS = Integer(
    "prompt_logprobs",
    "Tells the probability of every prompt token, and of so many others; not in a stream.",
    Range(0, 20),
)
STREAM = Flag("stream", "Sends every token at once, as server-sent events.")
INCLUDE_USAGE = Flag("include_usage", "Adds a last frame with the usage of all choices.")
STREAM_OPTIONS = Object("stream_options", "Options of a stream.", (INCLUDE_USAGE,))
INCLUDE_STOP = Flag("include_stop_str_in_output", "Leaves the matched stop text in the answer.")
SKIP_SPECIAL = Flag("skip_special_tokens", "Leaves special tokens out of the text.", default=True)

STOP = stop()
STOP_TOKEN_IDS = Special(
    "stop_token_ids",
    "Ends the answer at one of these tokens; ids outside the vocabulary are dropped.",
    stop_token_ids,
    {"type": "array", "items": {"type": "integer"}},
)

SAMPLING = (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SEED,
    REPETITION_PENALTY,
    PRESENCE_PENALTY,
    FREQUENCY_PENALTY,
    STOP_TOKEN_IDS,
    IGNORE_EOS,
)
STOPS = (STOP, INCLUDE_STOP, SKIP_SPECIAL)
CANDIDATES = (N, BEST_OF)

IGNORED = ignored(
    "do_sample",
    "user",
    "metadata",
    "store",
    "service_tier",
    "priority",
    "timeout",
    "request_id",
    "modalities",
    "prediction",
    "length_penalty",
    "add_special_tokens",
)
