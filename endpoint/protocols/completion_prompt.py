"""`prompt` of /v1/completions: a text or token ids, one or several."""

from __future__ import annotations

from typing import Any

from endpoint.protocols.base import GenerationRequest, ModelInfo, PromptList
from endpoint.validation import MAX_PROMPT_TOKENS, MAX_PROMPT_UNITS, Fields, checked_prompt_text, token_ids
from engine.errors import InvalidRequest

_WANTED = "a non-empty string, a non-empty array of token ids, or an array of either"


def read_prompt(fields: Fields, model: ModelInfo) -> str | tuple[int, ...] | PromptList:
    """An array with one prompt in it is that prompt. Raises InvalidRequest or GenerationRefused."""
    value = fields.raw("prompt")
    if isinstance(value, str):
        return checked_prompt_text(fields, "prompt", value)
    if not isinstance(value, list) or not value:
        raise fields.error("prompt", _WANTED, "send a prompt")
    if not isinstance(value[0], str | list):
        return token_ids(fields, "prompt", model.vocab_size)
    if len(value) > model.max_batch_size:
        raise fields.error(
            "prompt", f"an array of at most {model.max_batch_size} prompts (maxBatchSize)", "send fewer"
        )
    prompts = tuple(_one(item, index, type(value[0]), model) for index, item in enumerate(value))
    if len(prompts) == 1:
        return prompts[0]
    _check_total(prompts)
    return PromptList(prompts)


def check_sequences(fields: Fields, request: GenerationRequest, model: ModelInfo) -> None:
    """Refuse prompts that with their choices are more than one request may be. Raises InvalidRequest."""
    prompts, branches = len(request.prompts), request.sampling.branches
    if prompts > 1 and prompts * branches > model.max_batch_size:
        name = "n" if request.n == branches else "best_of"
        raise fields.error(
            name,
            f"at most {model.max_batch_size // prompts} for {prompts} prompts: prompts x choices is limited "
            f"to {model.max_batch_size} (maxBatchSize)",
            "lower it, or send fewer prompts",
        )


def _one(item: Any, index: int, kind: type, model: ModelInfo) -> str | tuple[int, ...]:
    name = f"prompt[{index}]"
    fields = Fields({name: item})
    if not isinstance(item, kind):
        raise fields.error(name, "of the same kind as `prompt[0]`", "send only texts, or only arrays of ids")
    if isinstance(item, str):
        return checked_prompt_text(fields, name, item)
    return token_ids(fields, name, model.vocab_size)


def _check_total(prompts: tuple[str | tuple[int, ...], ...]) -> None:
    """All prompts together may be as large as one alone may be."""
    limit = MAX_PROMPT_UNITS if isinstance(prompts[0], str) else MAX_PROMPT_TOKENS
    if sum(map(len, prompts)) > limit:
        raise InvalidRequest(
            f"`prompt` holds texts or token ids of more than {limit} characters or ids in all; send fewer"
        )
