"""Checked access to the members of a request body.

Every refusal is an InvalidRequest that names the field as the client wrote it, the value, what is legal
there, and what to do. `None` and absent are the same thing everywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import GenerationRefused, InvalidRequest

MAX_INT32 = 2**31 - 1
MAX_PROMPT_TOKENS = 1_048_576
MAX_PROMPT_UNITS = 4_194_304  # UTF-16 code units of one prompt
MAX_PROMPT_LOGPROBS = 100_000  # of all prompts of a request: a tenth of a second of writing
MAX_STOP_UNITS = 32_768  # of one stop string sent alone, and of a whole list
MAX_STOP_ITEM_UNITS = 1_024
_MAX_STOP_IDS = 1_024
_SHOWN_CHARACTERS = 60
FUNCTION_NAME_PATTERN = r"[A-Za-z0-9_\-\u4e00-\u9fff]{1,64}"
_FUNCTION_NAME = re.compile(FUNCTION_NAME_PATTERN)
FUNCTION_NAME_RULE = "1 to 64 letters, digits, `_`, `-` or Chinese characters"


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers; writes itself the way an error text wants it."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.low_open else 'of at least'} {self.low}"
        return f"in {'(' if self.low_open else '['}{self.low}, {self.high}{')' if self.high_open else ']'}"


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, low_open=True)
UNIT = Range(0, 1)
UNIT_ABOVE_ZERO = Range(0, 1, low_open=True)
UNIT_OPEN = Range(0, 1, low_open=True, high_open=True)
PENALTY = Range(-2, 2)
COUNT = Range(1, MAX_INT32)
SEED = Range(0, 2**64 - 1)


def show(value: Any) -> str:
    """A short repr for an error text: scalars cut at 60 characters, only the kind of everything else."""
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def utf16_units(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def is_larger(value: Any, limit: int) -> bool:
    """Whether a JSON value is larger than `limit`: the UTF-16 code units of all its strings, and 1 per value.

    Stops as soon as that is known, so a small limit is cheap to ask for.
    """
    rest = [value]
    while rest:
        item = rest.pop()
        limit -= 1
        if isinstance(item, str):
            limit -= len(item) if len(item) > limit else utf16_units(item)
        elif isinstance(item, Mapping):
            rest.extend(item)
            rest.extend(item.values())
        elif isinstance(item, list | tuple):
            rest.extend(item)
        if limit < 0:
            return True
    return False


class Fields:
    """The members of one JSON object, read with their types checked. `body` is the object."""

    __slots__ = ("_prefix", "body")

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix`: what stands before a member's name in error texts, as in `parameters.`."""
        self.body = body
        self._prefix = prefix

    def raw(self, name: str) -> Any:
        return self.body.get(name)

    def path(self, name: str) -> str:
        """The member's name as error texts have it."""
        return self._prefix + name

    def error(self, name: str, wanted: str, advice: str = "correct it or leave it out") -> InvalidRequest:
        value = self.raw(name)
        found = "missing" if value is None else show(value)
        return InvalidRequest(f"`{self._prefix}{name}` is {found}, but must be {wanted}; {advice}")

    def unsupported(self, name: str, advice: str = "leave it out") -> InvalidRequest:
        value = show(self.raw(name))
        return InvalidRequest(f"`{self._prefix}{name}` is {value}: not supported by this build; {advice}")

    def boolean(self, name: str) -> bool | None:
        value = self.body.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(name, "true or false")

    def flag(self, name: str) -> bool:
        """False when it is not there."""
        return self.boolean(name) is True

    def integer(self, name: str, legal: Range) -> int | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value not in legal:
            raise self.error(name, f"an integer {legal}")
        return value

    def number(self, name: str, legal: Range) -> float | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or value not in legal:
            raise self.error(name, f"a number {legal}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(name, f"a finite number {legal}")
        return number

    def text(self, name: str) -> str | None:
        """A non-empty string."""
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise self.error(name, "a non-empty string")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, f"{self._prefix}{name}.")

    def array(self, name: str) -> list[Any] | None:
        value = self.body.get(name)
        if value is None or isinstance(value, list):
            return value
        raise self.error(name, "an array")


def stop_strings(
    fields: Fields, max_units: int = MAX_STOP_UNITS, max_items: int | None = None
) -> tuple[str, ...]:
    """`stop`: one string of up to `max_units` code units, or a list of up to `max_items` of them."""
    value = fields.raw("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        if not value or utf16_units(value) > max_units:
            raise fields.error("stop", f"a string of 1 to {max_units} characters, or a list of strings")
        return (value,)
    if not isinstance(value, list):
        raise fields.error("stop", "a non-empty string or a list of non-empty strings")
    if max_items is not None and len(value) > max_items:
        raise fields.error("stop", f"a list of at most {max_items} strings", "send fewer")
    total = 0
    for item in value:
        units = utf16_units(item) if isinstance(item, str) else 0
        if not 1 <= units <= MAX_STOP_ITEM_UNITS:
            raise fields.error("stop", f"a list of strings of 1 to {MAX_STOP_ITEM_UNITS} characters each")
        total += units
    if total > MAX_STOP_UNITS:
        raise fields.error("stop", f"a list of strings of at most {MAX_STOP_UNITS} characters in all")
    return tuple(dict.fromkeys(value))


def stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """`stop_token_ids` without duplicates and without ids that no token can have."""
    value = fields.array("stop_token_ids")
    if value is None:
        return ()
    if not all(type(item) is int for item in value):
        raise fields.error("stop_token_ids", "an array of integers")
    distinct = tuple(dict.fromkeys(item for item in value if 0 <= item < vocab_size))
    if len(distinct) > _MAX_STOP_IDS:
        raise fields.error(
            "stop_token_ids", f"an array of at most {_MAX_STOP_IDS} different ids", "send fewer"
        )
    return distinct


def token_ids(fields: Fields, name: str, vocab_size: int, legal: Range | None = None) -> tuple[int, ...]:
    """A prompt of token ids.

    Raises GenerationRefused for ids outside the vocabulary, InvalidRequest for any other fault.
    """
    value = fields.array(name)
    if not value or not all(type(item) is int for item in value):
        raise fields.error(name, "a non-empty array of integers", "send token ids")
    if len(value) > MAX_PROMPT_TOKENS:
        raise fields.error(name, f"an array of at most {MAX_PROMPT_TOKENS} token ids", "shorten it")
    lowest, highest = min(value), max(value)
    if legal is not None and not (lowest in legal and highest in legal):
        raise fields.error(name, f"an array of integers {legal}", "send ids of this model's vocabulary")
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise GenerationRefused(
            f"`{fields.path(name)}` holds the token id {show(wrong)}, but ids must be in "
            f"[0, {vocab_size - 1}]; send ids of this model's vocabulary"
        )
    return tuple(value)


def checked_prompt_text(fields: Fields, name: str, text: str) -> str:
    if not text:
        raise fields.error(name, "a non-empty text", "send a prompt")
    if len(text) > MAX_PROMPT_UNITS // 2 and utf16_units(text) > MAX_PROMPT_UNITS:
        raise InvalidRequest(f"`{name}` is longer than {MAX_PROMPT_UNITS} characters; shorten it")
    return text


def check_token_count(count: int) -> None:
    """Refuse a prompt whose text has become more tokens than any prompt may have. Raises InvalidRequest."""
    if count > MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"the prompt has {count} tokens, but must have at most {MAX_PROMPT_TOKENS}; shorten it"
        )


def check_prompt_logprobs(num_tokens: int, num_others: int) -> None:
    """Refuse probabilities of prompts that together are too many. Raises GenerationRefused.

    `num_tokens`: of all prompts; `num_others`: most likely tokens told beside each.
    """
    count = num_tokens * (num_others + 1)
    if count > MAX_PROMPT_LOGPROBS:
        raise GenerationRefused(
            f"`prompt_logprobs` (or `logprobs` with `echo`) asks for {count} probabilities: {num_others} + 1 "
            f"for each of {num_tokens} prompt tokens; allowed: at most {MAX_PROMPT_LOGPROBS} in a request; "
            "lower it, or send fewer prompts at once"
        )


def joined_text(value: Any, where: str) -> str:
    """A string, or text parts joined without separator. `where` names the field in error texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else show(value)
        raise InvalidRequest(f"`{where}` is {found}, but must be a string or a non-empty array of text parts")
    return "".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f'`{where}` is {show(part)}, but must be {{"type": "text", "text": "..."}}')
    kind = part.get("type")
    if kind != "text":
        raise InvalidRequest(
            f'`{where}.type` is {show(kind)}, but must be "text": this model takes no other kind'
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"`{where}.text` is {show(text)}, but must be a string")
    return text


def is_function_name(value: str) -> bool:
    return _FUNCTION_NAME.fullmatch(value) is not None


def function_name(value: Any, where: str) -> str:
    if isinstance(value, str) and is_function_name(value):
        return value
    raise InvalidRequest(f"`{where}` is {show(value)}, but must be {FUNCTION_NAME_RULE}")


def required_text(message: Mapping[str, Any], name: str, where: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not value:
        found = "missing" if value is None else show(value)
        raise InvalidRequest(f"`{where}.{name}` is {found}, but must be a non-empty string")
    return value


def objects(value: Sequence[Any], where: str) -> list[Mapping[str, Any]]:
    """The items of an array that must all be objects."""
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"`{where}[{index}]` is {show(item)}, but must be an object")
    return list(value)
