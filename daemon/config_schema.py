"""Every key of config.json, one row each: section, name, type, range or set, default.

The rows say what one value may be. What two values must be to each other is in config_rules.py, what has to
exist on disk in config_files.py. A row's default is the value assumed when the key is absent.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

SERVER = "ServerConfig"
HEALTH = "ServerConfig.HealthCheckConfig"
BACKEND = "BackendConfig"
KV_POOL = "BackendConfig.kvPoolConfig"
RUNTIME = "BackendConfig.runtimeConfig"
DEPLOY = "BackendConfig.ModelDeployConfig"
MODEL = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
SCHEDULE = "BackendConfig.ScheduleConfig"

U32_MAX = 4294967295
I32_MAX = 2147483647
MAX_TOKENS = 4194304
MODEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,254}[A-Za-z0-9])?"

Kind = Literal[
    "bool",
    "int",
    "string",
    "path",  # a string that can name a file
    "address",  # IPv4 or IPv6 literal, the latter with or without brackets
    "strings",  # low..high non-empty strings
    "ids",  # list of lists of integers >= 0
    "object",
    "objects",  # list of objects
    "switch",  # the truncation key: true, false, -1, 0 or 1
    "string or object",
]

REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    kind: Kind
    default: Any = REQUIRED
    low: int = 0
    high: int = U32_MAX
    also: tuple[int, ...] = ()  # integers accepted outside [low, high]
    choices: tuple[Any, ...] = ()
    pattern: str = ""
    secret: bool = False  # findings do not show the value
    allowed: str = ""  # what findings call the accepted values, when range or choices do not say it

    def permitted(self) -> str:
        if self.allowed:
            return self.allowed
        if self.choices:
            return ", ".join(_quoted(choice) for choice in self.choices)
        if self.kind == "int":
            return " or ".join([*map(str, self.also), f"[{self.low}, {self.high}]"])
        if self.kind == "strings":
            return f"{self.low} to {self.high} non-empty strings"
        return _KIND_TEXT[self.kind]

    def fault(self, value: object) -> str | None:
        """What is wrong with `value` on its own; None when nothing is."""
        if not _is_kind(self.kind, value):
            return f"must be {_KIND_TEXT[self.kind]}, not {_type_text(value)}"
        if self.choices and value not in self.choices:
            return "not one of the allowed values"
        if self.kind == "int" and not (self.low <= value <= self.high or value in self.also):  # type: ignore[operator]
            return "out of range"
        if self.pattern and not re.fullmatch(self.pattern, value):  # type: ignore[call-overload]
            return "malformed"
        return _text_fault(self, value)

    def meant(self, value: object) -> str:
        """A guess at what a faulty value should have been: another spelling, or the same without quotes."""
        candidates: list[Any] = []
        if isinstance(value, str):
            names = {choice.lower(): choice for choice in self.choices if isinstance(choice, str)}
            candidates += [names[near] for near in difflib.get_close_matches(value.lower(), names, 1, 0.7)]
            candidates += [int(value)] if re.fullmatch(r"-?\d{1,18}", value.strip()) else []
            candidates += [{"true": True, "false": False}.get(value.strip().lower())]
        elif isinstance(value, float) and value.is_integer():
            candidates += [int(value)]
        elif self.kind == "bool" and value in (0, 1):
            candidates += [bool(value)]
        elif self.kind == "ids" and isinstance(value, list):
            candidates += [[value]]
        usable = [item for item in candidates if item is not None and self.fault(item) is None]
        return f"did you mean {json.dumps(usable[0])}?" if usable else ""


_KIND_TEXT: dict[Kind, str] = {
    "bool": "true or false",
    "int": "an integer",
    "string": "a string",
    "path": "a path of 1 to 4096 characters",
    "address": "an IPv4 or IPv6 address literal",
    "strings": "an array of strings",
    "ids": "an array of arrays of device ids >= 0",
    "object": "an object",
    "objects": "an array of objects",
    "switch": "true, false, -1, 0 or 1",
    "string or object": "a string holding JSON, or an object",
}


_TYPE_TEXT: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number with fraction or exponent",
    str: "a string",
    list: "an array like this",
    dict: "an object",
    type(None): "null",
}


def _type_text(value: object) -> str:
    # by isinstance: a parsed object is a dict of its own kind; bool stands before int, which it also is
    return next(text for kind, text in _TYPE_TEXT.items() if isinstance(value, kind))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_kind(kind: Kind, value: object) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return _is_int(value)
        case "string" | "path" | "address":
            return isinstance(value, str)
        case "strings":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "ids":
            return isinstance(value, list) and all(
                isinstance(inner, list) and all(_is_int(item) for item in inner) for inner in value
            )
        case "object":
            return isinstance(value, dict)
        case "objects":
            return isinstance(value, list) and all(isinstance(item, dict) for item in value)
        case "switch":
            return isinstance(value, int)
        case "string or object":
            return isinstance(value, str | dict)


def _text_fault(key: Key, value: Any) -> str | None:
    match key.kind:
        case "path" if value == "" and key.default == "":
            return None
        case "path":
            return _path_fault(value)
        case "address":
            return None if parse_address(value) else "not an address literal; host names are not accepted"
        case "strings" if not key.low <= len(value) <= key.high:
            return f"{len(value)} entries"
        case "strings":
            return next((fault for item in value if (fault := _path_fault(item))), None)
        case "ids" if any(item < 0 for inner in value for item in inner):
            return "negative device id"
        case "switch" if value not in (-1, 0, 1):
            return "not one of the allowed values"
        case _:
            return None


def _path_fault(text: str) -> str | None:
    if not 1 <= len(text) <= 4096:
        return f"{len(text)} characters long"
    if "\0" in text or any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        return "holds characters no file name can have"
    return None


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address an ipAddress key names; None when it names none."""
    try:
        if text.startswith("[") and text.endswith("]"):
            return ipaddress.IPv6Address(text[1:-1])
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _quoted(choice: object) -> str:
    return f'"{choice}"' if isinstance(choice, str) else str(choice)


@dataclass(frozen=True, slots=True)
class Section:
    path: str
    keys: tuple[Key, ...]
    required: bool = True
    strict: bool = False  # unknown members are refused instead of reported


def _tls_keys() -> tuple[Key, ...]:
    """Certificate keys of the three planes; config_files.py knows which of them are needed."""
    keys = [Key("tlsCaPath", "path", None)]
    for prefix in ("tls", "managementTls", "metricsTls"):
        keys += [
            Key(f"{prefix}CaFile", "strings", None, 1, 3),
            Key(f"{prefix}Cert", "path", None),
            Key(f"{prefix}Pk", "path", None),
            Key(f"{prefix}PkPwd", "path", ""),
            Key(f"{prefix}CrlPath", "path", ""),
            Key(f"{prefix}CrlFiles", "strings", (), 0, 3),
        ]
    return tuple(keys)


TLS_KEYS = _tls_keys()  # looked at only when httpsEnabled is true

SECTIONS: tuple[Section, ...] = (
    Section("", (Key("EnableDynamicAdjustTimeoutConfig", "bool", False),)),
    Section(
        SERVER,
        (
            Key("ipAddress", "address"),
            Key("managementIpAddress", "address", None),
            Key("port", "int", low=1024, high=65535),
            Key("managementPort", "int", None, 1024, 65535),
            Key("metricsPort", "int", 1027, 1024, 65535),
            Key("allowAllZeroIpListening", "bool"),
            Key("maxLinkNum", "int", low=1, high=4096),
            Key("maxRequestLength", "int", 40, 1, 100),
            Key("maxJsonDepth", "int", 10, 10, 100),
            Key("fullTextEnabled", "bool", False),
            Key("openAiSupport", "string", "vllm"),
            Key("tokenTimeout", "int", 600, 1, 3600),
            Key("e2eTimeout", "int", 600, 1, 65535),
            Key("inferMode", "string", pattern="(?i:standard|dmi)", allowed='"standard", "dmi"'),
            Key("distDPServerEnabled", "bool", False),
            Key("httpsEnabled", "bool"),
            Key("interCommPort", "int", 1121, 1024, 65535),
            Key("layerwiseDisaggregated", "bool", False),
        ),
    ),
    Section(HEALTH, (Key("npuUsageThreshold", "int", 0, 0, 100),), required=False),
    Section(
        BACKEND,
        (
            Key("backendName", "string", pattern="(?=.{1,50}$)[a-z]+(_[a-z]+)*",
                allowed="lower-case words joined by _, at most 50 characters"),
            Key("modelInstanceNumber", "int", low=1, high=10),
            Key("npuDeviceIds", "ids"),
            Key("tokenizerProcessNumber", "int", low=1, high=32),
            Key("multiNodesInferEnabled", "bool", False),
            Key("multiNodesInferPort", "int", 1120, 1024, 65535),
        ),
    ),
    Section(
        KV_POOL,
        (
            Key("backend", "string", "", choices=("", "unifiedcache", "mooncake", "memcache")),
            Key("configPath", "string", "", pattern=r"(?s:.{0,500})", allowed="at most 500 characters"),
            Key("asyncWrite", "bool", False),
        ),
        required=False,
    ),
    Section(
        RUNTIME,
        (
            Key("deviceType", "string", "auto", choices=("auto", "npu", "cuda", "cpu")),
            Key("dtype", "string", "auto", choices=("auto", "float32", "bfloat16", "float16")),
            Key("linearDtype", "string", "auto", choices=("auto", "fp8")),
            Key("kvCacheDtype", "string", "auto", choices=("auto", "int8")),
            Key("kvCacheMemMiB", "int", 0, 0, I32_MAX),
            Key("kvCacheBlockNum", "int", 0, 0, I32_MAX),
            Key("cpuThreads", "int", 0, 0, 4096),
            Key("workerInitTimeoutSec", "int", 7200, 10, 86400),
            Key("batchInvariant", "bool", False),
            Key("stepTimeoutSec", "int", 30, 1, 3600),
            Key("gracefulStopTimeoutSec", "int", 30, 0, 600),
            Key("maxWaitingTokens", "int", 0, 0, I32_MAX),
            Key("apiKeys", "objects", (), secret=True),
            Key("ipcDir", "string", "", pattern=r"[^\x00\ud800-\udfff]{0,60}",
                allowed="at most 60 characters"),
            Key("maxConnections", "int", 0, 32, 1000000, also=(0,)),
            Key("handshakeTimeoutSec", "int", 10, 1, 600),
            Key("headTimeoutSec", "int", 10, 1, 600),
            Key("bodyTimeoutSec", "int", 60, 1, 3600),
            Key("keepAliveSec", "int", 75, 1, 3600),
            Key("writeStallSec", "int", 60, 1, 3600),
            Key("allowedHosts", "strings", (), 0, 64),
        ),
        required=False,
        strict=True,
    ),
    Section(
        DEPLOY,
        (
            Key("maxSeqLen", "int", low=1),
            Key("maxInputTokenLen", "int", low=1, high=MAX_TOKENS),
            Key("truncation", "switch", False),
            Key("speculationGamma", "int", 0),
            Key("maxLoras", "int", 0),
            Key("maxLoraRank", "int", 0),
            Key("LoraModules", "objects", ()),
        ),
    ),
    Section(
        MODEL,
        (
            Key("modelInstanceType", "string", "Standard",
                choices=("Standard", "StandardMock", "TargetModel", "AssistantModel")),
            Key("modelName", "string", pattern=MODEL_NAME,
                allowed="1 to 256 of A-Z a-z 0-9 _ . -, first and last a letter or digit"),
            Key("modelWeightPath", "path"),
            Key("worldSize", "int", low=1),
            Key("cpuMemSize", "int"),
            Key("npuMemSize", "int", low=1, high=I32_MAX, also=(-1,)),
            Key("backendType", "string", choices=("atb", "torch", "ms")),
            Key("trustRemoteCode", "bool", False),
            Key("tp", "int", None, 1),
            Key("dp", "int", -1, 1, also=(-1,)),
            Key("cp", "int", 1, 1),
            Key("sp", "int", 1, 1),
            Key("pp", "int", 1, 1, 1, allowed="1"),
            Key("moe_ep", "int", None, 1),
            Key("moe_tp", "int", None, 1),
            Key("plugin_params", "string or object", ""),
            Key("models", "object", None),
            Key("ignore_eos", "bool", False),
        ),
    ),
    Section(
        SCHEDULE,
        (
            Key("templateType", "string", choices=("Standard", "Mix")),
            Key("templateName", "string", choices=("Standard_LLM",)),
            Key("cacheBlockSize", "int", low=1, high=128),
            Key("maxPrefillBatchSize", "int", low=1, also=(0,)),
            Key("maxPrefillTokens", "int", low=1, high=MAX_TOKENS),
            Key("prefillTimeMsPerReq", "int", low=0, high=1000),
            Key("decodeTimeMsPerReq", "int", low=0, high=1000),
            Key("prefillPolicyType", "int", low=0, high=0, allowed="0 (first come, first served)"),
            Key("decodePolicyType", "int", low=0, high=0, allowed="0 (first come, first served)"),
            Key("policyType", "int", 0, 4, 7, also=(0,)),
            Key("supportSelectBatch", "bool", False),
            Key("stageSelectPolicy", "int", 0, 0, 2),
            Key("dynamicBatchSizeEnable", "bool", False),
            Key("prefillExpectedTime", "int", 1500, 1, 10000),
            Key("decodeExpectedTime", "int", 50, 1, 10000),
            Key("maxBatchSize", "int", low=1, high=819200),
            Key("maxIterTimes", "int", low=1),
            Key("maxPreemptCount", "int"),
            Key("maxQueueDelayMicroseconds", "int", low=500, high=1000000),
            Key("maxFirstTokenWaitTime", "int", 2500, 0, 3600000),
            Key("maxN", "int", None, 1, 8192),
            Key("prefillChunkSize", "int", 0, 1, MAX_TOKENS, also=(0,)),
            Key("maxNumPartialPrefills", "int", 64, 1, 64),
            Key("longPrefillTokenThreshold", "int", 1024, 1, 8192),
            Key("maxLongPartialPrefills", "int", None, 1, 64),
            Key("bufferResponseEnabled", "bool", False),
            Key("distributedEnable", "bool", False),
        ),
    ),
)  # fmt: skip
