"""LoRA adapters of the configuration: LoraModules, or the older lora_adapter.json beside the weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from daemon.config_files import FILE_MODE, Permissions, is_mock, path_fault
from daemon.config_plugins import PLUGIN_PARAMS
from daemon.config_report import Report, shown
from daemon.config_schema import DEPLOY, MODEL, MODEL_NAME
from daemon.config_values import Values
from engine.file_modes import DIRECTORY_MODE
from engine.quantisation import quantize_scheme
from engine.settings import LoraModule, LoraSettings

_MODULES = f"{DEPLOY}.LoraModules"
_MAX_LORAS = f"{DEPLOY}.maxLoras"
_MAX_RANK = f"{DEPLOY}.maxLoraRank"
_MODEL_NAME = f"{MODEL}.modelName"
_MEMBERS = ("name", "path", "baseModelName")
_LEGACY = "lora_adapter.json"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RESERVED = "None"  # what requests send for the base model
_PATH_ALLOWED = f"a directory with {_CONFIG} and {_WEIGHTS}"
_NAME_ALLOWED = '1 to 256 of A-Z a-z 0-9 _ . -, first and last a letter or digit, not "None", not modelName'
# Plugins that compute with the base model's weights, or share what it has computed.
_NOT_WITH_ADAPTERS = ("prefix_cache", "splitfuse", "la", "memory_decoding")


class _Entry(NamedTuple):
    key: str  # where it stands in the configuration
    name: str
    path: str
    folder: Path  # what a relative path is relative to


def find_adapters(
    root: Path, weight_path: Path, values: Values, permissions: Permissions, report: Report
) -> LoraSettings:
    """Everything wrong with the adapters becomes a finding."""
    if not values.has(_MODULES, _MAX_LORAS, _MAX_RANK, _MODEL_NAME):
        return LoraSettings()
    max_loras, max_rank = values.integer(_MAX_LORAS), values.integer(_MAX_RANK)
    entries = _entries(root, weight_path, values, permissions, report)
    modules = []
    for entry in _without_repeated_names(entries, report):
        path = entry.folder / entry.path
        if _check_directory(entry, path, max_rank, permissions, report):
            modules.append(LoraModule(entry.name, path))
    if 0 < max_loras < len(modules):
        report.refuse(
            _MAX_LORAS, max_loras, f"{len(modules)} adapters are configured", f"0, [{len(modules)}, ...]"
        )
    settings = LoraSettings(tuple(modules), max_loras, max_rank, root, permissions.policy)
    if (max_loras > 0) != (max_rank > 0):
        report.warn(
            f"{_MAX_LORAS}={max_loras}, {_MAX_RANK}={max_rank}: loading adapters at run time is off, "
            "it needs both above 0"
        )
    if entries or settings.dynamic:
        _check_company(bool(entries), values, report)
        if scheme := quantize_scheme(weight_path):
            key, given = (_MODULES, len(entries)) if entries else (_MAX_LORAS, max_loras)
            wrong = f'adapters cannot be combined with quantised weights ("quantize": {shown(scheme)})'
            report.refuse(key, given, wrong, f"no {_MODULES} and maxLoras 0, or weights in floating point")
    return settings


def _check_company(has_modules: bool, values: Values, report: Report) -> None:
    """What adapters cannot be combined with."""
    if values.has(PLUGIN_PARAMS):
        for name in values.raw(PLUGIN_PARAMS):
            if name in _NOT_WITH_ADAPTERS:
                wrong = "cannot be combined with LoRA adapters"
                report.refuse(PLUGIN_PARAMS, name, wrong, f'"", or no {_MODULES} and maxLoras 0')
    if has_modules and is_mock(values):
        path = f"{MODEL}.modelInstanceType"
        report.refuse(path, values.raw(path), "has no weights to adapt", f'"Standard", or no {_MODULES}')


# --- what is configured ---


def _entries(
    root: Path, weight_path: Path, values: Values, permissions: Permissions, report: Report
) -> list[_Entry]:
    legacy = weight_path / _LEGACY
    given = values.raw(_MODULES)
    has_legacy = os.path.isfile(legacy)  # not Path.is_file, which raises where it may not look
    if given:
        if has_legacy:
            report.warn(f"{legacy}: ignored, as {_MODULES} is set")
        return _listed_entries(root, given, values, report)
    if has_legacy:
        report.warn(f"{legacy}: deprecated; list its adapters in {_MODULES} instead")
        permissions.check(_LEGACY, str(legacy), legacy, FILE_MODE)
        return _legacy_entries(legacy, values, report)
    return []


def _listed_entries(
    root: Path, given: list[Mapping[str, Any]], values: Values, report: Report
) -> list[_Entry]:
    base = values.text(_MODEL_NAME)
    entries = []
    for index, item in enumerate(given):
        key = f"{_MODULES}[{index}]"
        strangers = [name for name in item if name not in _MEMBERS]
        if strangers:
            report.warn(f"unknown keys, ignored: {', '.join(f'{key}.{name}' for name in strangers)}")
        before = len(report.findings)
        _check_name(f"{key}.name", item.get("name"), base, report)
        path = item.get("path")
        if not isinstance(path, str) or _path_unusable(path):
            _refuse(report, f"{key}.path", path, "not a path of 1 to 4096 characters", _PATH_ALLOWED)
        if item.get("baseModelName") != base:
            wrong = "names no model of this configuration"
            _refuse(report, f"{key}.baseModelName", item.get("baseModelName"), wrong, shown(base))
        if len(report.findings) == before:
            entries.append(_Entry(key, item["name"], item["path"], root))
    return entries


def _legacy_entries(file: Path, values: Values, report: Report) -> list[_Entry]:
    """{"name": "path", ...}; a relative path is relative to the file."""
    allowed = 'a JSON object {"adapter name": "directory"}'
    try:
        document: Any = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        report.refuse(_LEGACY, str(file), f"cannot be read: {error}", allowed)
        return []
    if not isinstance(document, dict):
        report.refuse(_LEGACY, str(file), "holds no JSON object", allowed)
        return []
    entries = []
    for name, path in document.items():
        before = len(report.findings)
        _check_name(_LEGACY, name, values.text(_MODEL_NAME), report)
        if not isinstance(path, str) or _path_unusable(path):
            report.refuse(f"{_LEGACY}.{name}", path, "not a path of 1 to 4096 characters", _PATH_ALLOWED)
        if len(report.findings) == before:
            entries.append(_Entry(f"{_LEGACY}.{name}", name, path, file.parent))
    return entries


def _check_name(key: str, name: object, base: str, report: Report) -> None:
    if not isinstance(name, str) or not re.fullmatch(MODEL_NAME, name):
        _refuse(report, key, name, "malformed", _NAME_ALLOWED)
    elif name == _RESERVED:
        report.refuse(key, name, "stands for the base model in requests", _NAME_ALLOWED)
    elif name == base:
        report.refuse(key, name, "is the name of the base model", _NAME_ALLOWED, (_MODEL_NAME, base))


def _path_unusable(path: str) -> bool:
    return not 1 <= len(path) <= 4096 or "\0" in path or any(0xD800 <= ord(char) <= 0xDFFF for char in path)


def _refuse(report: Report, key: str, value: object, wrong: str, allowed: str) -> None:
    """As `report.refuse`; a value that is not there is told as missing."""
    if value is None:
        report.absent(key, allowed)
    else:
        report.refuse(key, value, wrong, allowed)


def _without_repeated_names(entries: list[_Entry], report: Report) -> list[_Entry]:
    first: dict[str, _Entry] = {}
    for entry in entries:
        kept = first.setdefault(entry.name, entry)
        if kept is not entry:
            report.warn(f"{entry.key}.name={entry.name}: given before; {kept.key}.path={kept.path} is used")
    return list(first.values())


# --- on disk ---


def _check_directory(
    entry: _Entry, path: Path, max_rank: int, permissions: Permissions, report: Report
) -> bool:
    """Whether the adapter looks like one; what its tensors hold is judged when they are loaded."""
    key = f"{entry.key}.path" if entry.key.startswith(_MODULES) else entry.key
    before = len(report.findings)
    wrong = path_fault(path, "directory")
    if wrong:
        report.refuse(key, entry.path, wrong, _PATH_ALLOWED)
        return False
    permissions.check(key, entry.path, path, DIRECTORY_MODE)
    for name in (_CONFIG, _WEIGHTS):
        if wrong := path_fault(path / name, "file"):
            report.refuse(key, entry.path, wrong, _PATH_ALLOWED)
    if len(report.findings) == before:
        _check_config(key, entry.path, path / _CONFIG, max_rank, report)
    return len(report.findings) == before


def _check_config(key: str, given: str, file: Path, max_rank: int, report: Report) -> None:
    allowed = "an adapter_config.json with r and lora_alpha"
    try:
        config: Any = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        report.refuse(key, given, f"cannot be read: {file}: {error}", allowed)
        return
    if not isinstance(config, dict):
        report.refuse(key, given, f"{file} holds no JSON object", allowed)
        return
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        report.refuse(key, given, f'{file}: no positive integer "r"', allowed)
    elif 0 < max_rank < rank:
        report.refuse(key, given, f"{file}: rank {rank}", f"ranks up to {max_rank}", (_MAX_RANK, max_rank))
    if type(alpha) not in (int, float):
        report.refuse(key, given, f'{file}: no number "lora_alpha"', allowed)
