"""From a parsed document to typed values by dotted path: types, ranges, defaults, stray names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from daemon.config_history import (
    LOG,
    OLD_SECTIONS,
    RENAMED,
    ignored_names,
    ignored_reason,
)
from daemon.config_json import join
from daemon.config_report import Report
from daemon.config_schema import (
    DEPLOY,
    MODEL,
    REQUIRED,
    SECTIONS,
    SERVER,
    TLS_KEYS,
    Key,
    Section,
)

_MODEL_LIST = MODEL.removesuffix("[0]")
_LOG_KEYS = ("dynamicLogLevel", "dynamicLogLevelValidHours", "dynamicLogLevelValidTime")
_LOG_SECTION = Section(LOG, (), required=False)  # log_settings.py reads it, as it may change while serving


class Values:
    """Accepted values by dotted path. A key with a finding is not in here."""

    def __init__(self) -> None:
        self._by_path: dict[str, Any] = {}

    def put(self, path: str, value: object) -> None:
        self._by_path[path] = value

    def copy(self) -> Values:
        """One that may be changed by itself."""
        other = Values()
        other._by_path = dict(self._by_path)
        return other

    def by_path(self) -> Mapping[str, Any]:
        """All of them, to be read only."""
        return self._by_path

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
    """Look at every key of every section. Findings and the warnings about names go to `report`."""
    values = Values()
    names = _Names(report)
    for section, members in _sections(document, report):
        keys = section.keys + (TLS_KEYS if section.path == SERVER else ())
        strangers = names.sort(section, members, [key.name for key in keys])
        if section.path == SERVER and members.get("httpsEnabled") is not True:
            keys = section.keys
        for key in keys:
            _read_key(section.path, key, document, members, strangers, report, values)
    if isinstance(document.get(LOG), dict):
        names.sort(_LOG_SECTION, document[LOG], list(_LOG_KEYS))
    names.warn()
    return values


def _sections(document: Mapping[str, Any], report: Report) -> list[tuple[Section, Mapping[str, Any]]]:
    """Each section that can be read, parents first. A child of a missing section is not mentioned."""
    found: dict[str, Mapping[str, Any]] = {}
    for section in SECTIONS:
        parent_path, _, name = section.path.rpartition(".")
        if section.path == "":
            found[""] = document
        elif parent_path in found:
            members = _section_members(section, document, found[parent_path], name, report)
            if members is not None:
                found[section.path] = members
    return [(section, found[section.path]) for section in SECTIONS if section.path in found]


def _section_members(
    section: Section, document: Mapping[str, Any], parent: Mapping[str, Any], name: str, report: Report
) -> Mapping[str, Any] | None:
    if section.path == MODEL:
        return _only_model(document, parent, report)
    value = parent.get(name, REQUIRED)
    if value is REQUIRED:
        if not section.required:
            return {}
        report.absent(section.path, "an object", _where_instead(document, name))
        return None
    if not isinstance(value, dict):
        report.refuse(section.path, value, "must be an object", "an object")
        return None
    return value


def _only_model(
    document: Mapping[str, Any], parent: Mapping[str, Any], report: Report
) -> Mapping[str, Any] | None:
    value = parent.get("ModelConfig", REQUIRED)
    allowed = "an array of exactly one object"
    if value is REQUIRED:
        hint = _other_name(DEPLOY, "ModelConfig", list(parent)) or _where_instead(document, "ModelConfig")
        report.absent(_MODEL_LIST, allowed, hint)
    elif not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        report.refuse(_MODEL_LIST, value, "must be an array of objects", allowed)
    elif len(value) != 1:
        report.refuse(_MODEL_LIST, value, f"{len(value)} models", allowed)
    else:
        only: Mapping[str, Any] = value[0]
        return only
    return None


# --- names ---


class _Names:
    """Tells known, ignored, renamed, outdated and unknown members apart, and gathers what to say of them."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._unknown: list[str] = []
        self._renamed: list[str] = []
        self._ignored: dict[tuple[str, str], list[str]] = {}

    def sort(self, section: Section, members: Mapping[str, Any], keys: list[str]) -> list[str]:
        """Sort a section's members; those that are unknown or were renamed are also returned."""
        known = keys + _subsection_names(section.path)
        strangers = []
        for name in members:
            if name in known:
                continue
            path = join(section.path, name)
            if reason := ignored_reason(section.path, name):
                self._ignored.setdefault((section.path, reason), []).append(name)
            elif name in OLD_SECTIONS:
                wrong = "section of an older file layout, which is built differently"
                self._report.malformed(path, "{...}", wrong, f"{OLD_SECTIONS[name]}, written anew")
            elif now := RENAMED.get(section.path, {}).get(name):
                strangers.append(name)
                self._renamed.append(f"{path} (now {now})")
            else:
                strangers.append(name)
                self._stranger(section, name, members[name], known)
        return strangers

    def _stranger(self, section: Section, name: str, value: object, known: list[str]) -> None:
        path = join(section.path, name)
        if section.strict:
            hint = _did_you_mean(name, known)
            if isinstance(value, dict | list):  # it may be a misspelt list of secrets
                self._report.refuse_secret(path, f"unknown key{hint}", ", ".join(known))
            else:
                self._report.refuse(path, value, f"unknown key{hint}", ", ".join(known))
            return
        hint = _did_you_mean(name, known + ignored_names(section.path)) or _belongs(section.path, name)
        self._unknown.append(path + hint)

    def warn(self) -> None:
        """One warning for each kind of name that is not read."""
        if self._unknown:
            self._report.warn("unknown keys, ignored: " + ", ".join(self._unknown))
        if self._renamed:
            self._report.warn("keys under names of older versions, ignored: " + ", ".join(self._renamed))
        if self._ignored:
            groups = (
                f"{path}.{names[0]} ({reason})"
                if len(names) == 1
                else f"{path}.{{{', '.join(names)}}} ({reason})"
                for (path, reason), names in self._ignored.items()
            )
            self._report.warn("keys without effect in this server, ignored: " + "; ".join(groups))


def _subsection_names(path: str) -> list[str]:
    names = ["Version", LOG] if path == "" else []
    for section in SECTIONS[1:]:
        parent, _, name = section.path.rpartition(".")
        if parent == path:
            names.append(name.removesuffix("[0]"))
    return names


def _did_you_mean(name: str, known: list[str]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, 1, 0.75)
    return f" (did you mean {lowered[close[0]]}?)" if close else ""


def _belongs(path: str, name: str) -> str:
    """Which other section has a key or a subsection of that name."""
    homes = [
        section.path
        for section in SECTIONS
        if any(key.name == name for key in section.keys) or name in _subsection_names(section.path)
    ]
    return f" (belongs to {homes[0] or 'the top level'})" if homes and homes[0] != path else ""


def _where_instead(document: Mapping[str, Any], name: str) -> str:
    """Where else in the file something of that name lies."""
    places = [path for path, found in _members(document, "") if found == name]
    return f"the file has it at {', '.join(places)}: move it" if places else ""


def _members(value: object, path: str) -> Iterator[tuple[str, str]]:
    """(path, name) of every member of every object in the document."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield join(path, name), name
            yield from _members(child, join(path, name))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _members(child, f"{path}[{index}]")


# --- values ---


def _read_key(
    section_path: str,
    key: Key,
    document: Mapping[str, Any],
    members: Mapping[str, Any],
    strangers: list[str],
    report: Report,
    values: Values,
) -> None:
    path = join(section_path, key.name)
    value = members.get(key.name, key.default)
    if key.name not in members:
        if value is REQUIRED:
            hint = _other_name(section_path, key.name, strangers) or _where_instead(document, key.name)
            report.absent(path, key.permitted(), hint)
        else:
            values.put(path, value)
    elif fault := key.fault(value):
        if key.secret:
            report.refuse_secret(path, fault, key.permitted())
        else:
            report.refuse(path, value, fault, key.permitted(), hint=key.meant(value))
    else:
        values.put(path, value)


def _other_name(section_path: str, name: str, strangers: list[str]) -> str:
    """What stands in the section under a former or a misspelled name."""
    for former, now in RENAMED.get(section_path, {}).items():
        if former in strangers and now == name:
            return f"the file has {former}, its name in older versions"
    close = difflib.get_close_matches(name, strangers, 1, 0.75)
    return f"is {close[0]} a misspelling of it?" if close else ""
