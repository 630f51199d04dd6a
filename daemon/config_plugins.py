"""plugin_params: JSON text, or an object, that names the features of a model."""

from __future__ import annotations

import difflib

from daemon.config_json import VALUE_DEPTH, parse_json
from daemon.config_report import Report, shown
from daemon.config_schema import MODEL
from daemon.config_values import Values

PLUGIN_PARAMS = f"{MODEL}.plugin_params"
PREFIX_CACHE = "prefix_cache"
_SPEED_PLUGINS = (PREFIX_CACHE, "splitfuse")  # change speed, never results
_RESULT_PLUGINS = ("la", "memory_decoding", "mtp")


def read_plugins(values: Values, report: Report) -> None:
    """Replace plugin_params by the tuple of its plugin names, or drop it with a finding."""
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
        if _plugins_usable(names, given, report):
            values.put(PLUGIN_PARAMS, names)


def _plugins_usable(names: tuple[str, ...], given: object, report: Report) -> bool:
    usable = True
    for name in names:
        if name == PREFIX_CACHE:
            continue
        if name in _SPEED_PLUGINS:
            report.warn(f"{PLUGIN_PARAMS}: plugin {name} is not available in this build yet; running without")
            continue
        usable = False
        if name in _RESULT_PLUGINS:
            wrong = f"plugin {name} is not supported by this build"
        else:
            close = difflib.get_close_matches(name, (*_SPEED_PLUGINS, *_RESULT_PLUGINS), 1)
            wrong = f"unknown plugin {shown(name)}" + (f" (did you mean {close[0]}?)" if close else "")
        report.refuse(PLUGIN_PARAMS, given, wrong, f'"", plugin_type {" or ".join(_SPEED_PLUGINS)}')
    return usable
