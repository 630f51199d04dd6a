"""Strict JSON: no duplicate keys, no NaN or Infinity, bounded depth; every fault with its dotted path."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

FILE_DEPTH = 32  # generous: the stock file needs 6, its free-form `models` object a few more
VALUE_DEPTH = 10  # plugin_params and JSON in environment variables

JsonFault = tuple[str, str]  # dotted path ("" = the document itself), what is wrong


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        found.repeated = tuple(key for key, count in times.items() if count > 1)
    return found


def parse_json(text: str, max_depth: int) -> tuple[Any, list[JsonFault]]:
    """The parsed value and everything wrong with it. With faults the value must not be used."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        return None, [("", f"nested deeper than {max_depth} levels")]
    except ValueError as error:  # also integers of thousands of digits
        return None, [("", f"not valid JSON: {error}")]
    return value, list(_faults(value, "", max_depth))


def _faults(value: object, path: str, depth_left: int) -> Iterator[JsonFault]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, "NaN, Infinity and numbers too large to represent are not allowed"
    if not isinstance(value, dict | list):
        return
    if depth_left == 0:
        yield path, "nested too deeply"
        return
    if isinstance(value, _Object):
        for key in value.repeated:
            yield join(path, key), "key given more than once"
    children = (
        ((join(path, key), child) for key, child in value.items())
        if isinstance(value, dict)
        else ((f"{path}[{index}]", child) for index, child in enumerate(value))
    )
    for child_path, child in children:
        yield from _faults(child, child_path, depth_left - 1)


def join(path: str, key: str) -> str:
    """The dotted path of a member; a name that could break the line of a report is shown escaped."""
    name = key if key.isprintable() else json.dumps(key)
    return f"{path}.{name}" if path else name
