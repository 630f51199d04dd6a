"""The `models` object: a few switches of the chat endpoint among options of NPU kernels."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from daemon.config_files import FILE_MODE, Permissions, path_fault
from daemon.config_report import Report, shown
from daemon.config_schema import MODEL
from daemon.config_values import Values
from endpoint.tools.registry import FORMATS
from engine.settings import ChatSettings

_MODELS = f"{MODEL}.models"
_REASONING = "enable_reasoning"
_TEMPLATE = "chat_template"
_PARSER = "tool_call_parser"
_PARSER_OPTIONS = "tool_call_options"


class _Switch(NamedTuple):
    key: str  # where it stands in the configuration
    name: str
    value: Any


def find_chat_settings(root: Path, values: Values, permissions: Permissions, report: Report) -> ChatSettings:
    """The switches of all architectures, which must agree: one model is served, whatever its key is."""
    if not values.has(_MODELS):
        return ChatSettings()
    switches, others = _read_switches(values.raw(_MODELS) or {}, report)
    if others:
        report.warn(f"{', '.join(others)}: options of NPU kernels, ignored")
    used: dict[str, _Switch] = {}
    for switch in switches:
        if not _is_usable(switch, root, permissions, report):
            continue
        first = used.setdefault(switch.name, switch)
        if first.value != switch.value:
            report.refuse(
                switch.key,
                switch.value,
                f"differs from {first.key}={shown(first.value)}",
                "one value, as one model is served",
            )
    template = used.get(_TEMPLATE)
    return ChatSettings(
        reasoning=used[_REASONING].value if _REASONING in used else False,
        tool_call_parser=used[_PARSER].value if _PARSER in used else "",
        template=root / template.value if template else None,
    )


def _read_switches(models: Mapping[str, Any], report: Report) -> tuple[list[_Switch], list[str]]:
    """The switches that are set, and the keys of everything else."""
    switches: list[_Switch] = []
    others: list[str] = []
    for architecture, options in models.items():
        where = f"{_MODELS}.{architecture}"
        if not isinstance(options, dict):
            others.append(where)
            continue
        for name, value in options.items():
            if name == _PARSER_OPTIONS:
                switches += _parser_options(f"{where}.{name}", value, report)
            elif name not in (_REASONING, _TEMPLATE, _PARSER):
                others.append(f"{where}.{name}")
            elif value is not None:
                switches.append(_Switch(f"{where}.{name}", name, value))
    return switches, others


def _parser_options(where: str, options: Any, report: Report) -> Iterator[_Switch]:
    if not isinstance(options, dict | None):
        report.refuse(where, options, "must be an object", f'an object like {{"{_PARSER}": "hermes"}}')
    elif options and options.get(_PARSER) is not None:
        yield _Switch(f"{where}.{_PARSER}", _PARSER, options[_PARSER])


def _is_usable(switch: _Switch, root: Path, permissions: Permissions, report: Report) -> bool:
    """Whether the value can be used; when not, there is a finding."""
    key, name, value = switch
    if name == _REASONING:
        wrong, allowed = "" if isinstance(value, bool) else "must be true or false", "true or false"
    elif name == _PARSER:
        wrong, allowed = _parser_fault(value), ", ".join(f'"{known}"' for known in FORMATS)
    else:
        wrong, allowed = _template_fault(root, value), "the path of a readable .jinja file"
    if wrong:
        report.refuse(key, value, wrong, allowed)
    elif name == _TEMPLATE:
        permissions.check(key, value, root / value, FILE_MODE)
    return not wrong


def _parser_fault(value: Any) -> str:
    if not isinstance(value, str):
        return "must be a string"
    if value in FORMATS:
        return ""
    close = difflib.get_close_matches(value, FORMATS, 1)
    return "no known format of tool calls" + (f" (did you mean {close[0]}?)" if close else "")


def _template_fault(root: Path, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        return "must be a path"
    if not value.endswith(".jinja"):
        return "does not end with .jinja"
    return path_fault(root / value, "file") or ""
