"""plugin_params: JSON text, or an object, that names the features of a model and says how far they go."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from daemon.config_json import VALUE_DEPTH, parse_json
from daemon.config_report import Report, shown
from daemon.config_schema import DEPLOY, MODEL
from daemon.config_values import Values

PLUGIN_PARAMS = f"{MODEL}.plugin_params"
PREFIX_CACHE = "prefix_cache"
SPLITFUSE = "splitfuse"
LOOKAHEAD, MEMORY_DECODING = "la", "memory_decoding"
SPECULATION = (LOOKAHEAD, MEMORY_DECODING)
GUESS_LENGTH = f"{PLUGIN_PARAMS}.guess_length"  # of the last two, not a key: tokens guessed per step, or 0
_GAMMA = f"{DEPLOY}.speculationGamma"
_USABLE = (PREFIX_CACHE, SPLITFUSE, *SPECULATION)
_KNOWN = (*_USABLE, "mtp")
# What cannot be had together (config.md 9.2 has the reasons of the original).
_EXCLUDE = ((SPLITFUSE, LOOKAHEAD), (SPLITFUSE, MEMORY_DECODING), (LOOKAHEAD, MEMORY_DECODING))
# Further fields of a plugin: name, type, lowest, highest. All are required.
_FIELDS: Mapping[str, tuple[tuple[str, type, int, int], ...]] = {
    MEMORY_DECODING: (("decoding_length", int, 1, 16), ("dynamic_algo", bool, 0, 1)),
    LOOKAHEAD: (("level", int, 3, 16), ("window", int, 1, 16), ("guess_set_size", int, 1, 16)),
}


def read_plugins(values: Values, report: Report) -> None:
    """Replace plugin_params by the tuple of its plugin names, or drop it with a finding; put GUESS_LENGTH."""
    values.put(GUESS_LENGTH, 0)
    if not values.has(PLUGIN_PARAMS):
        return
    given = values.raw(PLUGIN_PARAMS)
    values.drop(PLUGIN_PARAMS)
    allowed = 'a JSON object like {"plugin_type":"prefix_cache"}, at most 1024 characters'
    if given in ("", {}):
        values.put(PLUGIN_PARAMS, ())
        return
    if isinstance(given, str):
        if len(given) > 1024:
            report.refuse(PLUGIN_PARAMS, given, f"{len(given)} characters long", allowed)
            return
        params, faults = parse_json(given, VALUE_DEPTH)
    else:
        params, faults = given, []
    if faults:
        wrong = "; ".join(f"{fault.path}: {fault.wrong}" if fault.path else fault.wrong for fault in faults)
        report.refuse(PLUGIN_PARAMS, given, wrong, allowed)
    elif not isinstance(params, dict) or not isinstance(params.get("plugin_type"), str):
        report.refuse(PLUGIN_PARAMS, given, 'holds no string "plugin_type"', allowed)
    else:
        names = tuple(name.strip() for name in params["plugin_type"].split(",") if name.strip())
        if _plugins_usable(names, given, report) and _fields_usable(names, params, values, report):
            values.put(PLUGIN_PARAMS, names)
            values.put(GUESS_LENGTH, _guess_length(names, params))


def _plugins_usable(names: tuple[str, ...], given: object, report: Report) -> bool:
    usable = True
    for name in names:
        if name in _USABLE:
            continue
        usable = False
        if name in _KNOWN:
            wrong = f"plugin {name} is not supported by this build"
        else:
            close = difflib.get_close_matches(name, _KNOWN, 1)
            wrong = f"unknown plugin {shown(name)}" + (f" (did you mean {close[0]}?)" if close else "")
        report.refuse(PLUGIN_PARAMS, given, wrong, f'"", plugin_type {" or ".join(_USABLE)}')
    for one, other in _EXCLUDE:
        if one in names and other in names:
            usable = False
            report.refuse(PLUGIN_PARAMS, given, f"{one} and {other} exclude each other", "one of them")
    return usable


def _fields_usable(names: tuple[str, ...], params: Mapping[str, Any], values: Values, report: Report) -> bool:
    """The further fields of the plugins, and that speculationGamma leaves room for what they guess."""
    usable = True
    for name in names:
        for field, kind, lowest, highest in _FIELDS.get(name, ()):
            allowed = "true or false" if kind is bool else f"[{lowest}, {highest}]"
            key = f"{PLUGIN_PARAMS}.{field}"
            if field not in params:
                usable = False
                report.absent(key, allowed, f"{name} needs it")
            elif type(params[field]) is not kind or not lowest <= params[field] <= highest:
                usable = False
                report.refuse(key, params[field], "not allowed", allowed)
        if usable and name in SPECULATION and values.has(_GAMMA):
            needed, gamma = _places(name, params), values.integer(_GAMMA)
            if needed > gamma:
                usable = False
                report.refuse(
                    _GAMMA, gamma, f"{name} guesses up to {needed} tokens a step", f"[{needed}, ...]"
                )
    return usable


def _places(name: str, params: Mapping[str, Any]) -> int:
    """What the original compares with speculationGamma."""
    if name == MEMORY_DECODING:
        return int(params["decoding_length"])
    return int((params["level"] - 1) * (params["window"] + params["guess_set_size"]))


def _guess_length(names: tuple[str, ...], params: Mapping[str, Any]) -> int:
    """Tokens guessed in one step. Of lookahead's n-grams, `level` long, the first token is known."""
    if MEMORY_DECODING in names:
        return int(params["decoding_length"])
    return int(params["level"]) - 1 if LOOKAHEAD in names else 0
