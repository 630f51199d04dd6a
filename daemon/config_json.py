"""Strict JSON: no duplicate keys, no NaN or Infinity, bounded depth; every fault with its dotted path."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from daemon.config_report import shown

FILE_DEPTH = 32  # generous: the stock file needs 6, its free-form `models` object a few more
VALUE_DEPTH = 10  # plugin_params and JSON in environment variables
_API_KEY_HASH = re.compile("[0-9A-Fa-f]{64}")


class JsonFault(NamedTuple):
    path: str  # dotted; "" = the document itself
    wrong: str
    value: str = ""  # as a report shows it; "" for the document itself


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
        return None, [JsonFault("", f"nested deeper than {max_depth} levels")]
    except json.JSONDecodeError as error:
        return None, [JsonFault("", f"not valid JSON: {error}{_likely_cause(text, error)}")]
    except ValueError as error:  # integers of thousands of digits
        return None, [JsonFault("", f"not valid JSON: {error}")]
    return value, list(_faults(value, "", max_depth))


def _likely_cause(text: str, error: json.JSONDecodeError) -> str:
    """What people write there who are used to other formats."""
    before, here = text[: error.pos].rstrip(), text[error.pos : error.pos + 2]
    if here.startswith("#") or here in ("//", "/*"):
        return "; comments are not allowed"
    if here[:1] in ("\u201c", "\u201d", "\uff02"):
        return '; typographic quotes, use "'
    if here[:1] in ("}", "]") and before.endswith(","):
        return "; a comma before the closing bracket is not allowed"
    if error.msg.startswith("Illegal trailing comma"):  # Python 3.13 and newer
        return "; a comma before the closing bracket is not allowed"
    if error.msg.startswith("Expecting ',' delimiter"):
        return "; is a comma missing before it, or inside of the quotes?"
    return ""


def _faults(value: object, path: str, depth_left: int) -> Iterator[JsonFault]:
    if isinstance(value, float) and not math.isfinite(value):
        wrong = "NaN, Infinity and numbers too large to represent are not allowed"
        yield JsonFault(path, wrong, _brief(value))
    if not isinstance(value, dict | list):
        return
    if depth_left == 0:
        yield JsonFault(path, "nested too deeply", _brief(value))
        return
    if isinstance(value, _Object):
        for key in value.repeated:
            yield JsonFault(
                join(path, key), "key given more than once, the last value shown", _brief(value[key])
            )
    children = (
        ((join(path, key), child) for key, child in value.items())
        if isinstance(value, dict)
        else ((f"{path}[{index}]", child) for index, child in enumerate(value))
    )
    for child_path, child in children:
        yield from _faults(child, child_path, depth_left - 1)


def _brief(value: object) -> str:
    """Containers only hinted at: a faulty one may be nested too deeply to be written out."""
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    if isinstance(value, str) and _API_KEY_HASH.fullmatch(value):
        return "<not shown>"
    return shown(value)


def join(path: str, key: str) -> str:
    """The dotted path of a member; a name that could break the line of a report is shown escaped."""
    name = key if key.isprintable() else json.dumps(key)
    return f"{path}.{name}" if path else name
