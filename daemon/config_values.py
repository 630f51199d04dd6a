"""From a parsed document to typed values by dotted path: types, ranges, defaults, stray names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from daemon.config_json import join
from daemon.config_report import Report
from daemon.config_schema import (
    IGNORED,
    MODEL,
    OLD_SECTIONS,
    REQUIRED,
    SECTIONS,
    SERVER,
    TLS_KEYS,
    Key,
    Section,
)

_MODEL_LIST = MODEL.removesuffix("[0]")


class Values:
    """Accepted values by dotted path. A key with a finding is not in here."""

    def __init__(self) -> None:
        self._by_path: dict[str, Any] = {}

    def put(self, path: str, value: object) -> None:
        self._by_path[path] = value

    def drop(self, path: str) -> None:
        self._by_path.pop(path, None)

    def has(self, *paths: str) -> bool:
        return all(path in self._by_path for path in paths)

    def raw(self, path: str) -> Any:
        return self._by_path[path]

    def integer(self, path: str) -> int:
        return int(self._by_path[path])

    def maybe_integer(self, path: str) -> int | None:
        value: int | None = self._by_path[path]
        return value

    def flag(self, path: str) -> bool:
        return bool(self._by_path[path])

    def text(self, path: str) -> str:
        return str(self._by_path[path])


def read_values(document: Mapping[str, Any], report: Report) -> Values:
    """Look at every key of every section. Findings and the two warnings about names go to `report`."""
    values = Values()
    unknown: list[str] = []
    ignored: dict[tuple[str, str], list[str]] = {}
    for section, members in _sections(document, report):
        keys = section.keys + (TLS_KEYS if section.path == SERVER else ())
        strangers = _sort_names(section, members, keys, report, unknown, ignored)
        for key in section.keys:
            _read_key(section.path, key, members, strangers, report, values)
        if section.path == SERVER and members.get("httpsEnabled") is True:
            for key in TLS_KEYS:
                _read_key(SERVER, key, members, strangers, report, values)
    if unknown:
        report.warn("unknown keys, ignored: " + ", ".join(unknown))
    if ignored:
        groups = (
            f"{path}.{names[0]} ({reason})"
            if len(names) == 1
            else f"{path}.{{{', '.join(names)}}} ({reason})"
            for (path, reason), names in ignored.items()
        )
        report.warn("keys without effect in this server, ignored: " + "; ".join(groups))
    return values


def _sections(document: Mapping[str, Any], report: Report) -> list[tuple[Section, Mapping[str, Any]]]:
    """Each section that can be read, parents first. A child of a missing section is not mentioned."""
    found: dict[str, Mapping[str, Any]] = {}
    for section in SECTIONS:
        parent_path, _, name = section.path.rpartition(".")
        if section.path == "":
            found[""] = document
        elif parent_path in found:
            members = _section_members(section, found[parent_path], name, report)
            if members is not None:
                found[section.path] = members
    return [(section, found[section.path]) for section in SECTIONS if section.path in found]


def _section_members(
    section: Section, parent: Mapping[str, Any], name: str, report: Report
) -> Mapping[str, Any] | None:
    if section.path == MODEL:
        return _only_model(parent.get("ModelConfig", REQUIRED), report)
    value = parent.get(name, REQUIRED)
    if value is REQUIRED:
        if not section.required:
            return {}
        report.absent(section.path, "an object")
        return None
    if not isinstance(value, dict):
        report.refuse(section.path, value, "must be an object", "an object")
        return None
    return value


def _only_model(value: object, report: Report) -> Mapping[str, Any] | None:
    allowed = "an array of exactly one object"
    if value is REQUIRED:
        report.absent(_MODEL_LIST, allowed)
    elif not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        report.refuse(_MODEL_LIST, value, "must be an array of objects", allowed)
    elif len(value) != 1:
        report.refuse(_MODEL_LIST, value, f"{len(value)} models", allowed)
    else:
        only: Mapping[str, Any] = value[0]
        return only
    return None


def _sort_names(
    section: Section,
    members: Mapping[str, Any],
    keys: tuple[Key, ...],
    report: Report,
    unknown: list[str],
    ignored: dict[tuple[str, str], list[str]],
) -> list[str]:
    """Tell known, ignored, outdated and unknown members apart; the unknown ones are also returned."""
    known = [key.name for key in keys] + _subsection_names(section.path)
    strangers = []
    for name in members:
        if name in known:
            continue
        if reason := _ignored_reason(section.path, name):
            ignored.setdefault((section.path, reason), []).append(name)
        elif name in OLD_SECTIONS:
            wrong = "section of an older file layout, which is built differently"
            report.refuse(join(section.path, name), {}, wrong, f"{OLD_SECTIONS[name]}, written anew")
        else:
            strangers.append(name)
            if section.strict:
                hint = _did_you_mean(name, known)
                report.refuse(join(section.path, name), members[name], f"unknown key{hint}", ", ".join(known))
            else:
                unknown.append(join(section.path, name) + (_did_you_mean(name, known) or _belongs(name)))
    return strangers


def _subsection_names(path: str) -> list[str]:
    names = ["Version", "LogConfig"] if path == "" else []
    for section in SECTIONS[1:]:
        parent, _, name = section.path.rpartition(".")
        if parent == path:
            names.append(name.removesuffix("[0]"))
    return names


def _ignored_reason(section_path: str, name: str) -> str | None:
    return next(
        (why for path, pattern, why in IGNORED if path == section_path and fnmatchcase(name, pattern)), None
    )


def _did_you_mean(name: str, known: list[str]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, 1, 0.75)
    return f" (did you mean {lowered[close[0]]}?)" if close else ""


def _belongs(name: str) -> str:
    home = next((section.path for section in SECTIONS if any(key.name == name for key in section.keys)), None)
    return f" (belongs to {home})" if home else ""


def _read_key(
    section_path: str,
    key: Key,
    members: Mapping[str, Any],
    strangers: list[str],
    report: Report,
    values: Values,
) -> None:
    path = join(section_path, key.name)
    value = members.get(key.name, key.default)
    if key.name not in members:
        if value is REQUIRED:
            close = difflib.get_close_matches(key.name, strangers, 1, 0.75)
            report.absent(path, key.permitted() + (f" (is {close[0]} a misspelling?)" if close else ""))
        else:
            values.put(path, value)
    elif fault := key.fault(value):
        report.refuse(path, value, fault, key.permitted())
    else:
        values.put(path, value)
