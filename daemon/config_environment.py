"""Environment variables beside config.json: overrides of keys, and settings that have no key.

Each one that is in force leaves one line in the log; each bad one is a finding or a warning with its range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from daemon.config_json import VALUE_DEPTH, parse_json
from daemon.config_plugins import PLUGIN_PARAMS, SPECULATION
from daemon.config_report import Report
from daemon.config_schema import BACKEND, RUNTIME, SERVER
from daemon.config_values import Values
from engine.settings import ASYNC_SCHEDULING

DEFAULT_MEMORY_FRACTION = 0.8  # of the device memory, unless NPU_MEMORY_FRACTION says otherwise
_MULTI_NODE = f"{BACKEND}.multiNodesInferEnabled"
_DEVICES = f"{BACKEND}.npuDeviceIds"


@dataclass(frozen=True, slots=True)
class _Override:
    variable: str
    section: str
    key: str
    is_json: bool = False


_OVERRIDES = (
    _Override("MIES_CONTAINER_IP", SERVER, "ipAddress"),
    _Override("MIES_CONTAINER_MANAGEMENT_IP", SERVER, "managementIpAddress"),
    _Override("NPU_DEVICE_IDS", BACKEND, "npuDeviceIds", is_json=True),
    _Override("MINDIE_DEVICE_TYPE", RUNTIME, "deviceType"),
)

# Variables of the original that are read and lead to nothing here: (name, values that ask for nothing, why).
_WITHOUT_EFFECT: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("TOKENIZER_ENCODE_TIMEOUT", ("",), "ignored, e2eTimeout limits the encoding of a prompt as well"),
    ("MINDIE_LLM_RECOMPUTE_THRESHOLD", ("",), "ignored, sequences are always recomputed"),
    ("LOCAL_CACHE_DIR", ("",), "ignored, there are no multimodal models in this build"),
)
_OF_MULTI_NODE = ("RANK_TABLE_FILE", "MASTER_IP", "MASTER_PORT", "HOST_IP")
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


def apply_overrides(document: dict[str, Any], environ: Mapping[str, str], report: Report) -> None:
    """Write overriding variables over the keys they replace, so that they are validated like the keys."""
    for override in _OVERRIDES:
        text = environ.get(override.variable)
        if not text:
            continue
        value: Any = text
        if override.is_json:
            value, faults = parse_json(text, VALUE_DEPTH)
            if faults:
                report.refuse(override.variable, text, faults[0].wrong, "a JSON list of lists of device ids")
                continue
        section = _section_to_override(document, override.section)
        if section is not None:
            section[override.key] = value
            path = f"{override.section}.{override.key}"
            report.came_from(path, override.variable)
            report.note(f"{path}={text} taken from environment variable {override.variable}")


def _section_to_override(document: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The section's members; only runtimeConfig, which may be absent, is made when missing."""
    section: Any = document
    for name in path.split("."):
        if path == RUNTIME and name == "runtimeConfig" and isinstance(section, dict):
            section.setdefault(name, {})
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def memory_fraction(environ: Mapping[str, str], values: Values, report: Report) -> float:
    """NPU_MEMORY_FRACTION, or the default; a finding when it is no share."""
    text = environ.get("NPU_MEMORY_FRACTION") or str(DEFAULT_MEMORY_FRACTION)
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        report.refuse("NPU_MEMORY_FRACTION", text, "not a usable share of the device memory", "(0, 1]")
    elif fraction != DEFAULT_MEMORY_FRACTION and values.has(f"{RUNTIME}.deviceType"):
        if values.text(f"{RUNTIME}.deviceType") in ("auto", "cpu"):
            effect = "without effect on the CPU; npuMemSize limits the cache"
            report.warn(f"NPU_MEMORY_FRACTION={fraction}: {effect}")
        else:
            report.note(f"NPU_MEMORY_FRACTION={fraction} taken from the environment")
    return fraction


def metrics_enabled(environ: Mapping[str, str], report: Report) -> bool:
    """MIES_SERVICE_MONITOR_MODE: only 0 turns /metrics off."""
    mode = environ.get("MIES_SERVICE_MONITOR_MODE", "")
    if mode == "0":
        report.note("MIES_SERVICE_MONITOR_MODE=0: /metrics is off")
    elif mode not in ("", "1"):
        report.warn(f"MIES_SERVICE_MONITOR_MODE={mode}: neither 0 (off) nor 1 (on), ignored; /metrics is on")
    return mode != "0"


def async_scheduling(environ: Mapping[str, str], values: Values, report: Report) -> bool:
    """MINDIE_ASYNC_SCHEDULING_ENABLE: only 1 turns it on; a finding beside plugins that guess tokens."""
    mode = environ.get(ASYNC_SCHEDULING, "")
    if mode not in ("", "0", "1"):
        report.warn(f"{ASYNC_SCHEDULING}={mode}: neither 1 (on) nor 0 (off), ignored; it is off")
    if mode != "1":
        return False
    plugins = values.raw(PLUGIN_PARAMS) if values.has(PLUGIN_PARAMS) else ()
    guessing = [name for name in plugins if name in SPECULATION]
    if guessing:
        report.refuse(
            ASYNC_SCHEDULING,
            mode,
            f"the next step cannot be planned while {guessing[0]} guesses how many tokens this one gives",
            f"0, or no plugin {' or '.join(SPECULATION)}",
        )
    else:
        report.note(f"{ASYNC_SCHEDULING}=1: each step is planned while the one before it is computed")
    return True


def check_environment(environ: Mapping[str, str], values: Values, report: Report) -> None:
    """Variables that replace no key: what has no effect is told, what cannot be is refused."""
    for name, neutral, why in _WITHOUT_EFFECT:
        if environ.get(name, "") not in neutral:
            report.warn(f"{name}={environ[name]}: {why}")
    if values.has(_MULTI_NODE) and not values.flag(_MULTI_NODE):
        given = [name for name in _OF_MULTI_NODE if environ.get(name)]
        if given:
            report.note(f"{', '.join(given)}: for {_MULTI_NODE}=true only, ignored")
    _check_visible_devices(environ, values, report)


def _check_visible_devices(environ: Mapping[str, str], values: Values, report: Report) -> None:
    """Device ids count from 0 within the visible ones; on the CPU they are only names of workers."""
    if not values.has(f"{RUNTIME}.deviceType", _DEVICES):
        return
    variable = _VISIBLE.get(values.text(f"{RUNTIME}.deviceType"))
    if variable is None or variable not in environ:
        return
    visible = [device for device in environ[variable].split(",") if device.strip()]
    report.note(f"{variable}={environ[variable]}: device ids count from 0 in this order")
    for index, ids in enumerate(values.raw(_DEVICES)):
        beyond = [device for device in ids if device >= len(visible)]
        if beyond:
            wrong = f"device ids {beyond} beyond the {len(visible)} visible devices"
            hint = f"see {variable}={environ[variable]}"
            report.refuse(f"{_DEVICES}[{index}]", ids, wrong, f"ids below {len(visible)}", hint=hint)
