"""Names of other versions of MindIE: keys that do nothing here, keys that were renamed, sections that moved.

Their values are not looked at. What is in none of these tables and not in config_schema.py is unknown.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from daemon.config_schema import BACKEND, DEPLOY, MODEL, SCHEDULE, SERVER

LOG = "LogConfig"


def _certificate_keys(prefix: str) -> tuple[str, ...]:
    """Spelled out instead of `prefix*`, so that a misspelling among them can be told."""
    names = ("TLSEnabled", "Port", "TlsCaPath", "TlsCaFiles", "TlsCert", "TlsPk", "TlsPkPwd", "Pk", "PkPwd")
    return tuple(
        prefix + name for name in (*names, "TlsCrlPath", "TlsCrlFiles", "KmcKsfMaster", "KmcKsfStandby")
    )


# Known names that do nothing here: (section, name patterns, why).
IGNORED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (SERVER, ("kmcKsfMaster", "kmcKsfStandby"), "key passwords are plain files here"),
    (SERVER, _certificate_keys("interComm"), "for inferMode=dmi only"),
    (SERVER, ("layerwiseDisaggregated*",), "for edge-cloud split only"),
    (BACKEND, _certificate_keys("interNode"), "for multiNodesInferEnabled=true only"),
    (BACKEND, ("layerwiseDisaggregated*",), "for edge-cloud split only"),
    (MODEL, ("async_scheduler_wait_time",), "no effect"),
    (MODEL, ("kv_trans_timeout", "kv_link_timeout"), "for prefill/decode disaggregation only"),
    (SCHEDULE, ("enablePrefixCache", "enableSplit", "enablChunkedPrefill", "split*"), "now plugin_params"),
    (SCHEDULE, ("layerwiseDisaggregated",), "for edge-cloud split only"),
    (LOG, ("logLevel",), "now MINDIE_LOG_LEVEL in the environment"),
    (LOG, ("logFileSize", "logFileNum"), "now MINDIE_LOG_ROTATE in the environment"),
    (LOG, ("logPath",), "now MINDIE_LOG_PATH in the environment"),
)

# Keys under their former names: section -> name -> what it is called now.
RENAMED: dict[str, dict[str, str]] = {
    SERVER: {
        "tlsCrl": "tlsCrlPath and tlsCrlFiles",
        "managementTlsCrl": "managementTlsCrlPath and managementTlsCrlFiles",
        "interCommTlsCaFile": "interCommTlsCaPath and interCommTlsCaFiles",
        "interCommTlsCrl": "interCommTlsCrlPath and interCommTlsCrlFiles",
    },
    BACKEND: {
        "engineName": "backendName",
        "pipelineNumber": "modelInstanceNumber",
        "interNodeTlsCaFile": "interNodeTlsCaPath and interNodeTlsCaFiles",
        "interNodeTlsCrl": "interNodeTlsCrlPath and interNodeTlsCrlFiles",
    },
    DEPLOY: {"ModelParam": "ModelConfig"},
    MODEL: {"pluginParams": "plugin_params"},
}

# Sections of the 1.0.RC layouts, which are built differently: name -> where their members belong now.
OLD_SECTIONS: dict[str, str] = {
    "OtherParam": f"{SERVER}, {LOG} and {SCHEDULE}.cacheBlockSize",
    "ServeParam": SERVER,
    "LogParam": LOG,
    "ResourceParam": f"{SCHEDULE}.cacheBlockSize",
    "WorkFlowParam": f"{SCHEDULE}.templateType and {SCHEDULE}.templateName",
    "TemplateParam": f"{SCHEDULE}.templateType and {SCHEDULE}.templateName",
    "ModelDeployParam": f"{BACKEND} and {DEPLOY}",
    "ScheduleParam": SCHEDULE,
}


def ignored_reason(section_path: str, name: str) -> str | None:
    """Why a key does nothing here; None when it is none of the ignored ones."""
    for path, patterns, why in IGNORED:
        if path == section_path and any(fnmatchcase(name, pattern) for pattern in patterns):
            return why
    return None


def ignored_names(section_path: str) -> list[str]:
    """The ignored names of a section that are spelled out."""
    return [
        name for path, names, _ in IGNORED if path == section_path for name in names if not name.endswith("*")
    ]
