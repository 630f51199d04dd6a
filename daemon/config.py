"""config.json -> frozen slices, with every mistake reported at once.

Stages: file, JSON, types and ranges, rules between values, files on disk. A later stage looks at what the
earlier ones accepted, so one run lists all there is to mend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from daemon.config_api_keys import read_api_keys
from daemon.config_environment import (
    apply_overrides,
    async_scheduling,
    check_environment,
    memory_fraction,
    metrics_enabled,
)
from daemon.config_files import (
    FILE_MODE,
    Permissions,
    find_model,
    find_tls_files,
    is_mock,
    is_there,
    path_fault,
)
from daemon.config_json import FILE_DEPTH, parse_json
from daemon.config_lora import find_adapters
from daemon.config_models import find_chat_settings
from daemon.config_plugins import GUESS_LENGTH, PLUGIN_PARAMS, PREFIX_CACHE
from daemon.config_report import AcceptedModel, ConfigError, Report, shown
from daemon.config_rules import check_rules, expert_groups, server_addresses, server_ports
from daemon.config_schema import BACKEND, DEPLOY, HEALTH, MODEL, RUNTIME, SCHEDULE, SERVER
from daemon.config_values import Values, read_values
from daemon.listeners import merge_planes
from daemon.log_settings import DEFAULT_LOG, read_log_settings
from endpoint.tls import check_listeners
from engine.errors import StartupError
from engine.settings import (
    ApiKeySettings,
    ChatSettings,
    ConnectionSettings,
    EndpointSettings,
    Listener,
    LogSettings,
    LoraSettings,
    MixSettings,
    ModelSettings,
    ScheduleSettings,
    ServerSettings,
)

_MAX_FILE_BYTES = 10 * 1024 * 1024
_RAISE_TIMEOUTS = "EnableDynamicAdjustTimeoutConfig"
_RAISED_TOKEN_TIMEOUT_S = 3600
_RAISED_E2E_TIMEOUT_S = 65535


FileStamp = tuple[int, int, int]  # modified, size, inode: another one means that the file has changed


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration that can be used."""

    settings: ServerSettings
    values: Values  # of every key, defaults included; LogConfig's aside
    stamp: FileStamp | None  # of the file, from before it was read


def load_settings(config_file: Path | None, environ: Mapping[str, str], executable: Path) -> ServerSettings:
    """Find, read and judge config.json. Raises ConfigError with every finding."""
    return load_config(config_file, environ, executable).settings


def load_config(
    config_file: Path | None,
    environ: Mapping[str, str],
    executable: Path,
    last_log: LogSettings = DEFAULT_LOG,
) -> LoadedConfig:
    """As `load_settings`, and the keys it was made of. `last_log` replaces wrong values of LogConfig."""
    root = installation_root(environ, executable)
    source, path = _locate(config_file, environ, root)
    report = Report()
    permissions = Permissions(environ, report)
    stamp = file_stamp(path)
    document = _read_document(source, path, permissions, report)
    if document is None:
        raise ConfigError(report.findings, path)
    apply_overrides(document, environ, report)
    values = read_values(document, report)
    check_rules(values, report)
    check_environment(environ, values, report)
    fraction = memory_fraction(environ, values, report)
    overlapped = async_scheduling(environ, values, report)
    listeners = _listeners(root, values, permissions, report)
    weight_path, lora = Path(), LoraSettings()
    if values.has(f"{MODEL}.modelWeightPath"):
        weight_path = find_model(root, values, permissions, report)
        lora = find_adapters(root, weight_path, values, permissions, report)
    chat = find_chat_settings(root, values, permissions, report)
    api_keys = read_api_keys(values, report)
    log, log_warnings = read_log_settings(document.get("LogConfig"), last_log)
    report.warnings += log_warnings
    _remark(document, values, listeners, report)
    if report.findings:
        accepted = _accepted_model(values, weight_path, fraction, report)
        raise ConfigError(
            [*report.findings, *_certificate_findings(listeners)], path, report.warnings, accepted
        )

    ipc_dir = values.text(f"{RUNTIME}.ipcDir")
    settings = ServerSettings(
        root=root,
        config_file=path,
        endpoint=_endpoint(values, listeners, api_keys, environ, report),
        schedule=replace(_schedule(values, report), async_scheduling=overlapped),
        model=_model(values, weight_path, fraction, lora, chat),
        log=log,
        device_ids=tuple(tuple(ids) for ids in values.raw(f"{BACKEND}.npuDeviceIds")),
        worker_init_timeout_s=values.integer(f"{RUNTIME}.workerInitTimeoutSec"),
        step_timeout_s=values.integer(f"{RUNTIME}.stepTimeoutSec"),
        graceful_stop_timeout_s=values.integer(f"{RUNTIME}.gracefulStopTimeoutSec"),
        ipc_dir=root / ipc_dir if ipc_dir else None,
        warnings=tuple(report.warnings),
        notes=tuple(report.notes),
    )
    return LoadedConfig(settings, values, stamp)


# --- file ---


def installation_root(environ: Mapping[str, str], executable: Path) -> Path:
    """What relative paths of the configuration are relative to. `executable` lies in the root's bin/."""
    named = environ.get("MINDIE_LLM_HOME_PATH") or environ.get("MIES_INSTALL_PATH")
    return Path(named).absolute() if named else executable.resolve().parent.parent


def _locate(config_file: Path | None, environ: Mapping[str, str], root: Path) -> tuple[str, Path]:
    """What named the file, and the file. The first candidate that is set wins, even when it is broken."""
    if config_file is not None:
        return "--config-file", config_file.absolute()
    if environ.get("MIES_CONFIG_JSON_PATH"):
        return "MIES_CONFIG_JSON_PATH", Path(environ["MIES_CONFIG_JSON_PATH"]).absolute()
    installed = root / "conf" / "config.json"
    for variable in ("MINDIE_LLM_HOME_PATH", "MIES_INSTALL_PATH"):
        if environ.get(variable):
            return variable, installed
    in_tree = root / "config.json"
    # what is there and cannot be looked at is refused where it is read
    return "config.json", in_tree if is_there(in_tree) and not is_there(installed) else installed


def file_stamp(path: Path) -> FileStamp | None:
    """None while it cannot be looked at."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size, info.st_ino


def _read_document(
    source: str, path: Path, permissions: Permissions, report: Report
) -> dict[str, Any] | None:
    """The parsed file; None with findings when it cannot be read or is not strict JSON."""
    allowed = "a readable regular file of 1 byte to 10 MB"
    if wrong := path_fault(path, "file"):
        report.refuse(source, str(path), wrong, allowed)
        return None
    try:
        size = path.stat().st_size
        if not 0 < size <= _MAX_FILE_BYTES:
            report.refuse(source, str(path), f"{size} bytes long", allowed)
            return None
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.refuse(source, str(path), f"not UTF-8: {error.reason} at byte {error.start}", "UTF-8 text")
        return None
    except OSError as error:
        report.refuse(source, str(path), f"cannot be read: {error.strerror}", allowed)
        return None
    permissions.check("config.json", str(path), path, FILE_MODE)
    document, faults = parse_json(text, FILE_DEPTH)
    for fault in faults:
        report.malformed(fault.path or source, fault.value or shown(str(path)), fault.wrong)
    if faults:
        return None
    if not isinstance(document, dict):
        report.refuse(source, str(path), "holds no JSON object", "a JSON object")
        return None
    return document


# --- slices ---


def _listeners(root: Path, values: Values, permissions: Permissions, report: Report) -> tuple[Listener, ...]:
    """Empty when a key they depend on has a finding."""
    names = ("ipAddress", "managementIpAddress", "port", "managementPort", "metricsPort", "httpsEnabled")
    if not values.has(*(f"{SERVER}.{name}" for name in names)):
        return ()
    https = values.flag(f"{SERVER}.httpsEnabled")
    return tuple(
        Listener(
            planes,
            address,
            port,
            find_tls_files(planes[0], root, values, permissions, report) if https else None,
        )
        for planes, address, port in merge_planes(*server_addresses(values), *server_ports(values)) or ()
    )


def _accepted_model(
    values: Values, weight_path: Path, fraction: float, report: Report
) -> AcceptedModel | None:
    """The part that decides how much memory is taken, when nothing is wrong with it."""
    if not values.has(f"{MODEL}.modelWeightPath", f"{BACKEND}.npuDeviceIds") or any(
        finding.startswith(f"[config] {MODEL}.modelWeightPath=") for finding in report.findings
    ):
        return None
    try:
        schedule = _schedule(values, Report())
        model = _model(values, weight_path, fraction, LoraSettings(), ChatSettings())
    except KeyError:  # a key they are made of has a finding of its own
        return None
    return AcceptedModel(model, schedule, sum(map(len, values.raw(f"{BACKEND}.npuDeviceIds"))))


def _certificate_findings(listeners: tuple[Listener, ...]) -> list[str]:
    """What is wrong inside of the certificate files that were found, for a start that is refused anyway."""
    try:
        check_listeners(listeners)
    except StartupError as error:
        return str(error).splitlines()
    return []


def _remark(
    document: Mapping[str, Any], values: Values, listeners: tuple[Listener, ...], report: Report
) -> None:
    """Things that are allowed and still deserve a line in the log."""
    if document.get("Version") != "1.0.0":
        report.warn(f'Version={shown(document.get("Version"))}: expected "1.0.0"; read as if it were')
    https = f"{SERVER}.httpsEnabled"
    if values.has(https) and not values.flag(https):
        report.warn(f"{SERVER}.httpsEnabled=false: security: requests and answers travel unencrypted")
    by_plane = {listener.planes[0]: listener.tls for listener in listeners if listener.tls}
    business, management = by_plane.get("business"), by_plane.get("management")
    if business and management and business.cert_file == management.cert_file:
        report.warn(f"{SERVER}.managementTlsCert is the business certificate; separate sets are recommended")


def _endpoint(
    values: Values,
    listeners: tuple[Listener, ...],
    api_keys: tuple[ApiKeySettings, ...],
    environ: Mapping[str, str],
    report: Report,
) -> EndpointSettings:
    token_timeout, e2e_timeout = effective_timeouts(values)
    if values.flag(_RAISE_TIMEOUTS):
        report.note(f"{_RAISE_TIMEOUTS}=true: tokenTimeout is {token_timeout} s, e2eTimeout {e2e_timeout} s")
    return EndpointSettings(
        listeners=listeners,
        max_link_num=values.integer(f"{SERVER}.maxLinkNum"),
        max_request_bytes=values.integer(f"{SERVER}.maxRequestLength") * 1024 * 1024,
        max_json_depth=values.integer(f"{SERVER}.maxJsonDepth"),
        full_text=values.flag(f"{SERVER}.fullTextEnabled"),
        openai_flavour="vllm" if values.text(f"{SERVER}.openAiSupport") == "vllm" else "openai",
        token_timeout_s=token_timeout,
        e2e_timeout_s=e2e_timeout,
        tokenizer_threads=values.integer(f"{BACKEND}.tokenizerProcessNumber"),
        metrics_enabled=metrics_enabled(environ, report),
        npu_usage_threshold=values.integer(f"{HEALTH}.npuUsageThreshold"),
        connections=_connections(values),
        api_keys=api_keys,
        max_waiting_tokens=values.integer(f"{RUNTIME}.maxWaitingTokens"),
    )


def _connections(values: Values) -> ConnectionSettings:
    return ConnectionSettings(
        max_connections=values.integer(f"{RUNTIME}.maxConnections"),
        handshake_timeout_s=values.integer(f"{RUNTIME}.handshakeTimeoutSec"),
        head_timeout_s=values.integer(f"{RUNTIME}.headTimeoutSec"),
        body_timeout_s=values.integer(f"{RUNTIME}.bodyTimeoutSec"),
        keep_alive_s=values.integer(f"{RUNTIME}.keepAliveSec"),
        write_stall_s=values.integer(f"{RUNTIME}.writeStallSec"),
        allowed_hosts=tuple(values.raw(f"{RUNTIME}.allowedHosts")),
    )


def effective_timeouts(values: Values) -> tuple[int, int]:
    """tokenTimeout and e2eTimeout in force, in seconds."""
    if values.flag(_RAISE_TIMEOUTS):
        return _RAISED_TOKEN_TIMEOUT_S, _RAISED_E2E_TIMEOUT_S
    return values.integer(f"{SERVER}.tokenTimeout"), values.integer(f"{SERVER}.e2eTimeout")


def _schedule(values: Values, report: Report) -> ScheduleSettings:
    """The scheduler's limits after the silent adjustments, each of which leaves one line in the log."""

    def number(key: str) -> int:
        return values.integer(f"{SCHEDULE}.{key}")

    def adjusted(key: str, value: int, why: str) -> int:
        report.note(f"{SCHEDULE}.{key}={number(key)}: {value} is used, {why}")
        return value

    max_seq_len = values.integer(f"{DEPLOY}.maxSeqLen")
    max_input = values.integer(f"{DEPLOY}.maxInputTokenLen")
    prefill_tokens, batch = number("maxPrefillTokens"), number("maxBatchSize")
    recomputed = min(max_seq_len, max_input + number("maxIterTimes"))
    mix = _mix(values)
    if prefill_tokens < recomputed and mix is None:
        prefill_tokens = adjusted(
            "maxPrefillTokens", recomputed, "so that a recomputed sequence fits one prefill"
        )
    if batch > prefill_tokens:
        batch = adjusted("maxBatchSize", prefill_tokens, "the number of tokens in a prefill step")
    prefill_batch = number("maxPrefillBatchSize")
    if not 0 < prefill_batch <= batch or (mix and prefill_batch < batch):  # Mix knows no prefill batches
        prefill_batch = adjusted("maxPrefillBatchSize", batch, "the value of maxBatchSize")
    max_n = values.maybe_integer(f"{SCHEDULE}.maxN") or min(128, prefill_batch)
    if max_n > prefill_batch:  # all sequences of a request start in one prefill step
        max_n = adjusted("maxN", prefill_batch, "the value of maxPrefillBatchSize")
    return ScheduleSettings(
        block_size=number("cacheBlockSize"),
        max_prefill_batch_size=prefill_batch,
        max_prefill_tokens=prefill_tokens,
        max_batch_size=batch,
        max_iter_times=number("maxIterTimes"),
        max_queue_delay_us=number("maxQueueDelayMicroseconds"),
        max_first_token_wait_ms=number("maxFirstTokenWaitTime"),
        max_n=max_n,
        max_seq_len=max_seq_len,
        max_input_len=min(max_input, max_seq_len - 1),
        truncation=_truncation(values.raw(f"{DEPLOY}.truncation")),
        prefix_cache=PREFIX_CACHE in values.raw(PLUGIN_PARAMS),
        guess_length=values.integer(GUESS_LENGTH),
        max_preempt_count=number("maxPreemptCount"),
        mix=mix,
    )


def _mix(values: Values) -> MixSettings | None:
    """None: templateType Standard."""

    def number(key: str) -> int:
        return values.integer(f"{SCHEDULE}.{key}")

    if values.text(f"{SCHEDULE}.templateType") != "Mix":
        return None
    partial = number("maxNumPartialPrefills")
    long_partial = values.maybe_integer(f"{SCHEDULE}.maxLongPartialPrefills")
    return MixSettings(
        chunk_size=number("prefillChunkSize"),
        max_partial=partial,
        long_threshold=number("longPrefillTokenThreshold"),
        max_long_partial=min(8, partial) if long_partial is None else long_partial,
    )


def _truncation(value: bool | int) -> Literal["off", "keep_head", "keep_tail"]:
    if value is True or value == -1:
        return "keep_head"
    return "keep_tail" if value == 1 else "off"


def _model(
    values: Values, weight_path: Path, memory_fraction: float, lora: LoraSettings, chat: ChatSettings
) -> ModelSettings:
    return ModelSettings(
        name=values.text(f"{MODEL}.modelName"),
        weight_path=weight_path,
        instance_type="StandardMock" if is_mock(values) else "Standard",
        device_type=cast(Literal["auto", "npu", "cuda", "cpu"], values.text(f"{RUNTIME}.deviceType")),
        dtype=cast(Literal["auto", "float32", "bfloat16", "float16"], values.text(f"{RUNTIME}.dtype")),
        kv_cache_gib=values.integer(f"{MODEL}.npuMemSize"),
        kv_cache_mib=values.integer(f"{RUNTIME}.kvCacheMemMiB"),
        kv_block_num=values.integer(f"{RUNTIME}.kvCacheBlockNum"),
        memory_fraction=memory_fraction,
        cpu_threads=values.integer(f"{RUNTIME}.cpuThreads"),
        trust_remote_code=values.flag(f"{MODEL}.trustRemoteCode"),
        ignore_eos=values.flag(f"{MODEL}.ignore_eos"),
        linear_dtype=cast(Literal["auto", "fp8"], values.text(f"{RUNTIME}.linearDtype")),
        kv_cache_dtype=cast(Literal["auto", "int8"], values.text(f"{RUNTIME}.kvCacheDtype")),
        batch_invariant=values.flag(f"{RUNTIME}.batchInvariant"),
        world_size=values.integer(f"{MODEL}.worldSize"),
        moe_ep=expert_groups(values),
        cpu_mem_gib=values.integer(f"{MODEL}.cpuMemSize"),
        lora=lora,
        chat=chat,
    )
