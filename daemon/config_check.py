"""--check-config: everything that can be told about a configuration without starting, on standard output.

A line of a finding begins with the marker of its kind, [config], [tls] or [memory]; the last line counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from daemon.addresses import bind_listeners
from daemon.config import load_settings
from daemon.config_report import AcceptedModel, ConfigError, counted
from daemon.memory_plan import MemoryPlan, plan_memory
from endpoint.tls import check_listeners
from engine.errors import EXIT_CONFIG, EXIT_OK, StartupError
from engine.settings import Listener, ServerSettings
from worker.platforms.memory_limits import MemoryInfo, read_memory

_WIDTH = 14


def check_config(config_file: Path | None, environ: Mapping[str, str], executable: Path) -> int:
    """Print the report; the exit code is 0 when a start would not be refused for what is known now."""
    try:
        settings = load_settings(config_file, environ, executable)
    except ConfigError as error:
        plan, faults = _plan_model(error.accepted) if error.accepted is not None else ([], [])
        _print_findings([*error.findings, *faults], error.warnings, error.config_file, plan)
        return EXIT_CONFIG
    findings: list[str] = []
    warnings = list(settings.warnings)
    try:
        warnings += check_listeners(settings.endpoint.listeners)
    except StartupError as error:
        findings += str(error).splitlines()
    devices = sum(map(len, settings.device_ids))
    plan, faults = _plan_model(AcceptedModel(settings.model, settings.schedule, devices))
    plan = [*_plan_processes(settings), *plan]
    findings += faults
    warnings += _busy_addresses(settings)
    for note in settings.notes:
        print(f"note: {note}")
    _print_findings(findings, warnings, settings.config_file, plan)
    return EXIT_CONFIG if findings else EXIT_OK


def _print_findings(
    findings: Sequence[str], warnings: Sequence[str], config_file: Path, plan: Sequence[str]
) -> None:
    for finding in findings:
        print(finding)
    for warning in warnings:
        print(f"warning: {warning}")
    for line in plan:
        print(line)
    verdict = "" if findings else "valid, "
    print(f"{config_file}: {verdict}{counted(len(findings), 'error')}, {counted(len(warnings), 'warning')}")


def _busy_addresses(settings: ServerSettings) -> list[str]:
    """What a start would find taken now. No finding: it may be this very service that runs there."""
    try:
        for sock in bind_listeners(settings.endpoint.listeners):
            sock.close()
    except StartupError as error:
        return [f"a start now would end with exit code {error.exit_code}: {error}"]
    return []


# --- the plan ---


def _plan_processes(settings: ServerSettings) -> Iterator[str]:
    """Where it would listen, and what would be started."""
    for listener in settings.endpoint.listeners:
        yield _row("+".join(listener.planes), f"{url(listener)}{' (mutual TLS)' if listener.tls else ''}")
    yield _row("model", f"{settings.model.name}, {settings.model.weight_path}")
    for instance, devices in enumerate(settings.device_ids):
        ids = ", ".join(map(str, devices))
        yield _row(f"instance {instance}", f"{counted(len(devices), 'worker')}, device {ids}")


def _plan_model(accepted: AcceptedModel) -> tuple[list[str], list[str]]:
    """What the model takes of this machine; and, as a finding, why it cannot be served."""
    model, schedule, num_workers = accepted
    device = _row("device type", _device_text(model.device_type))
    if model.instance_type == "StandardMock":
        return [device, _row("memory", "StandardMock: no weights are loaded and no cache is filled")], []
    memory = read_memory(Path("/"))
    try:
        plan = plan_memory(model, schedule, num_workers, memory)
    except StartupError as error:
        return [device], [f"[memory] {error}"]
    return [device, *_memory_rows(plan, memory, num_workers)], []


def _device_text(device_type: str) -> str:
    if device_type == "auto":
        return "auto: the worker looks for devices at the start; the sizes below are those of the CPU"
    if device_type == "cpu":
        return "cpu"
    return f"{device_type}: whether it is there, and its memory, is known on the device only"


def _memory_rows(plan: MemoryPlan, memory: MemoryInfo, num_workers: int) -> Iterator[str]:
    """A worker's memory in MiB, and how many of the longest sequences fit its cache."""
    stored = ", ".join(sorted(plan.weights.elements))
    files = counted(plan.weights.num_files, "file")
    yield _row(
        "weights", f"{_mib(plan.weight_bytes)} as {plan.dtype} ({stored} in {files}, {plan.architecture})"
    )
    yield _row("largest step", f"{_mib(plan.activation_bytes)} estimated for a prefill and its logits")
    held_as = " in int8" if plan.int8_cache else ""
    yield _row("KV block", f"{plan.block_bytes} bytes for {plan.block_size} tokens{held_as}")
    per_sequence = plan.blocks_per_sequence
    yield _row(
        "longest text",
        f"{plan.max_seq_len} tokens take {per_sequence} blocks, {_mib(per_sequence * plan.block_bytes)}",
    )
    if plan.num_blocks is None or plan.available is None:
        yield _row("KV cache", f"by {plan.sizing_key}; blocks and what fits are known on the device only")
        return
    cache_bytes = plan.num_blocks * plan.block_bytes
    yield _row("KV cache", f"{plan.num_blocks} blocks by {plan.sizing_key}, {_mib(cache_bytes)}")
    yield _row("fits", f"{counted(plan.num_blocks // per_sequence, 'sequence')} of the longest text at once")
    needed = num_workers * (plan.weight_bytes + plan.activation_bytes + cache_bytes)
    yield _row(
        "memory",
        f"{_mib(needed)} for {counted(num_workers, 'worker')}; {_mib(memory.available)} of "
        f"{_mib(memory.total)} are available now",
    )


def _row(name: str, text: str) -> str:
    return f"  {name:<{_WIDTH}} {text}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def url(listener: Listener) -> str:
    host = f"[{listener.address}]" if ":" in listener.address else listener.address
    return f"{'https' if listener.tls else 'http'}://{host}:{listener.port}"
