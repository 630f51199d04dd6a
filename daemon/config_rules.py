"""What values have to be to each other, and what this build cannot do yet.

A rule runs only when every value it needs was accepted, so one mistake is not reported twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from daemon.config_plugins import PLUGIN_PARAMS, SPLITFUSE, read_plugins
from daemon.config_report import Report, shown
from daemon.config_schema import (
    BACKEND,
    DEPLOY,
    KV_POOL,
    MODEL,
    RUNTIME,
    SCHEDULE,
    SERVER,
    U32_MAX,
    parse_address,
)
from daemon.config_values import Values
from daemon.listeners import merge_planes

_MAX_INPUT = f"{DEPLOY}.maxInputTokenLen"
_MAX_SEQ = f"{DEPLOY}.maxSeqLen"
_PREFILL_TOKENS = f"{SCHEDULE}.maxPrefillTokens"
_MAX_BATCH = f"{SCHEDULE}.maxBatchSize"
_DEVICES = f"{BACKEND}.npuDeviceIds"
_WORLD = f"{MODEL}.worldSize"
_MOE_EP, _MOE_TP = f"{MODEL}.moe_ep", f"{MODEL}.moe_tp"
_MULTI_NODE = f"{BACKEND}.multiNodesInferEnabled"
_DEVICE_TYPE = f"{RUNTIME}.deviceType"
_TEMPLATE = f"{SCHEDULE}.templateType"


class Rule(NamedTuple):
    needs: tuple[str, ...]
    check: Callable[[Values, Report], None]


def check_rules(values: Values, report: Report) -> None:
    read_plugins(values, report)
    for rule in RULES:
        if values.has(*rule.needs):
            rule.check(values, report)
    for unsupported in UNSUPPORTED:
        if values.has(unsupported.path):
            unsupported.check(values, report)
    for path, neutral, note in WITHOUT_EFFECT:
        if values.has(path) and values.raw(path) not in neutral:
            report.warn(f"{path}={shown(values.raw(path))}: {note}")


# --- cross-field rules, numbered as in the configuration contract ---


def _device_lists(values: Values, report: Report) -> None:  # R1
    instances = f"{BACKEND}.modelInstanceNumber"
    count, devices = values.integer(instances), values.raw(_DEVICES)
    if len(devices) != count:
        wrong = f"{len(devices)} device list{'' if len(devices) == 1 else 's'} for {count} model instances"
        report.refuse(_DEVICES, devices, wrong, f"{count} inner lists", (instances, count))


def _devices_per_instance(values: Values, report: Report) -> None:  # R2
    if values.flag(_MULTI_NODE):
        return
    devices, world = values.raw(_DEVICES), values.integer(_WORLD)
    for index, ids in enumerate(devices):
        where = f"{_DEVICES}[{index}]"
        if len(set(ids)) != len(ids):
            report.refuse(where, ids, "duplicate device ids", f"{world} distinct ids", (_WORLD, world))
        if len(ids) != world:
            report.refuse(where, ids, f"{len(ids)} device ids", f"{world} distinct ids", (_WORLD, world))
    owners: dict[int, int] = {}
    for index, ids in enumerate(devices):
        taken = sorted({device for device in ids if owners.setdefault(device, index) != index})
        if taken:
            wrong = f"device ids {taken} already belong to an earlier model instance"
            report.refuse(f"{_DEVICES}[{index}]", ids, wrong, "each id in one instance only")


def _prefill_fits_prompt(values: Values, report: Report) -> None:  # R3
    tokens, prompt = values.integer(_PREFILL_TOKENS), values.integer(_MAX_INPUT)
    is_mix = values.has(_TEMPLATE) and values.text(_TEMPLATE) == "Mix"
    if tokens < prompt and not is_mix:
        wrong = f"smaller than {_MAX_INPUT}={prompt}"
        report.refuse(_PREFILL_TOKENS, tokens, wrong, f"[{prompt}, 4194304], or any with templateType Mix")


def _at_most_max_batch(key: str) -> Rule:  # R4, first half of R5, R6
    path = f"{SCHEDULE}.{key}"

    def check(values: Values, report: Report) -> None:
        value, limit = values.maybe_integer(path), values.integer(_MAX_BATCH)
        if value is not None and value > limit:
            lowest = 0 if key == "maxPreemptCount" else 1
            report.refuse(path, value, f"larger than {_MAX_BATCH}={limit}", f"[{lowest}, {limit}]")

    return Rule((path, _MAX_BATCH), check)


def _swap_needs_memory(values: Values, report: Report) -> None:  # second half of R5
    preempt, memory = f"{SCHEDULE}.maxPreemptCount", f"{MODEL}.cpuMemSize"
    if values.integer(preempt) > 0 and values.integer(memory) == 0:
        report.refuse(
            memory, 0, "swapping needs host memory", f"[1, {U32_MAX}]", (preempt, values.integer(preempt))
        )


def _lengths(values: Values, report: Report) -> None:  # R7
    seq_len, prompt = values.integer(_MAX_SEQ), values.integer(_MAX_INPUT)
    if seq_len == 1:
        report.refuse(_MAX_SEQ, 1, "no room for a prompt token and a new one", f"[2, {U32_MAX}]")
    if prompt > seq_len:
        report.warn(
            f"{_MAX_INPUT}={prompt}: larger than {_MAX_SEQ}={seq_len}; prompts are limited to {seq_len - 1}"
        )


def _output_fits(values: Values, report: Report) -> None:  # R7
    path = f"{SCHEDULE}.maxIterTimes"
    output, seq_len = values.integer(path), values.integer(_MAX_SEQ)
    if output > seq_len:
        report.refuse(path, output, f"larger than {_MAX_SEQ}={seq_len}", f"[1, {seq_len}]")


def _parallel(values: Values, report: Report) -> None:  # R8
    if values.flag(_MULTI_NODE):
        return  # worldSize counts the devices of this node only
    world = values.integer(_WORLD)
    dp, cp = max(1, values.integer(f"{MODEL}.dp")), values.integer(f"{MODEL}.cp")
    given_tp = values.maybe_integer(f"{MODEL}.tp")
    tp = given_tp if given_tp is not None else max(1, world // (dp * cp))
    if tp * dp * cp != world:
        path, value = (_WORLD, world) if given_tp is None else (f"{MODEL}.tp", given_tp)
        wrong = f"tp*dp*cp*pp = {tp}*{dp}*{cp}*1 = {tp * dp * cp}"
        report.refuse(path, value, wrong, "tp*dp*cp*pp equal to worldSize", (_WORLD, world))
    sp = values.integer(f"{MODEL}.sp")
    if sp not in (1, tp):
        report.refuse(f"{MODEL}.sp", sp, "neither 1 nor tp", f"1, {tp}")
    if cp > 1 and dp > 1:
        report.refuse(f"{MODEL}.cp", cp, "context parallel needs dp=1", "1", (f"{MODEL}.dp", dp))


def _experts_parallel(values: Values, report: Report) -> None:  # R8
    if values.flag(_MULTI_NODE):
        return
    world = values.integer(_WORLD)
    groups, ranks = values.maybe_integer(_MOE_EP), values.maybe_integer(_MOE_TP)
    if groups is not None and ranks is not None:
        if groups * ranks != world:
            wrong = f"moe_ep*moe_tp = {groups}*{ranks} = {groups * ranks}"
            report.refuse(_MOE_EP, groups, wrong, "moe_ep*moe_tp equal to worldSize", (_WORLD, world))
        return
    for path, size in ((_MOE_EP, groups), (_MOE_TP, ranks)):
        if size is not None and world % size:
            report.refuse(path, size, "no divisor of worldSize", f"a divisor of {world}", (_WORLD, world))


def expert_groups(values: Values) -> int:
    """Groups of ranks that experts are dealt to whole: moe_ep, or what moe_tp leaves of worldSize."""
    groups, ranks = values.maybe_integer(_MOE_EP), values.maybe_integer(_MOE_TP)
    if groups is not None:
        return groups
    return 1 if ranks is None else values.integer(_WORLD) // ranks


def _attention_divided_by_heads(values: Values, report: Report) -> None:  # R8
    if values.integer(_WORLD) > 1 and not values.flag(_MULTI_NODE):
        for unsupported in UNSUPPORTED_DIVISIONS:
            unsupported.check(values, report)


def _mix_and_splitfuse(values: Values, report: Report) -> None:  # R9
    template, splitfuse = values.text(_TEMPLATE), SPLITFUSE in values.raw(PLUGIN_PARAMS)
    if template == "Mix" and not splitfuse:
        report.refuse(
            _TEMPLATE,
            template,
            "needs splitfuse in plugin_params",
            '"Standard"',
            (PLUGIN_PARAMS, "splitfuse"),
        )
    if splitfuse and template != "Mix":
        report.refuse(_TEMPLATE, template, "splitfuse in plugin_params needs templateType Mix", '"Mix"')


def _node_port(values: Values, report: Report) -> None:  # R10
    path, other = f"{SERVER}.port", f"{BACKEND}.multiNodesInferPort"
    if values.integer(path) == values.integer(other):
        wrong = f"same as {other}"
        report.refuse(
            path,
            values.integer(path),
            wrong,
            "[1024, 65535] but not that port",
            (other, values.integer(other)),
        )


def _all_zero(key: str) -> Rule:  # R11
    path, switch = f"{SERVER}.{key}", f"{SERVER}.allowAllZeroIpListening"

    def check(values: Values, report: Report) -> None:
        text = values.raw(path)
        address = parse_address(text) if text is not None else None
        if address is None or values.flag(switch):
            return
        inner = getattr(address, "ipv4_mapped", None) or address
        if inner.is_unspecified:
            report.refuse(
                path, text, "listens on every address of this host", "a single address", (switch, False)
            )

    return Rule((path, switch), check)


def _splitfuse_company(values: Values, report: Report) -> None:  # R13
    if SPLITFUSE not in values.raw(PLUGIN_PARAMS):
        return
    stage, dynamic = f"{SCHEDULE}.stageSelectPolicy", f"{SCHEDULE}.dynamicBatchSizeEnable"
    if values.integer(stage) == 2:
        report.refuse(stage, 2, "cannot be combined with splitfuse", "0, 1", (PLUGIN_PARAMS, "splitfuse"))
    if values.flag(dynamic):
        report.refuse(
            dynamic, True, "cannot be combined with splitfuse", "false", (PLUGIN_PARAMS, "splitfuse")
        )


def _partial_prefills(values: Values, report: Report) -> None:  # R15
    path, other = f"{SCHEDULE}.maxLongPartialPrefills", f"{SCHEDULE}.maxNumPartialPrefills"
    value, limit = values.maybe_integer(path), values.integer(other)
    if value is not None and value > limit:
        report.refuse(path, value, f"larger than {other}={limit}", f"[1, {limit}]")


def _chunk_fits(values: Values, report: Report) -> None:  # R15
    path = f"{SCHEDULE}.prefillChunkSize"
    value, limit = values.integer(path), values.integer(_PREFILL_TOKENS)
    if value and values.text(_TEMPLATE) != "Mix":
        report.warn(f"{path}={value}: without effect unless templateType is Mix")
    if value > limit:
        report.refuse(path, value, f"larger than {_PREFILL_TOKENS}={limit}", f"[1, {limit}], or 0")


def _layout(values: Values, report: Report) -> None:
    """Ports and addresses that no arrangement of listeners fits."""
    path, other = f"{SERVER}.metricsPort", f"{SERVER}.managementPort"
    ports = server_ports(values)
    if merge_planes(*server_addresses(values), *ports) is None:
        wrong = "same as the business port, but managementPort differs"
        report.refuse(
            path, ports[2], wrong, f"managementPort={ports[1]}, or a port of its own", (other, ports[1])
        )


def _block_size(values: Values, report: Report) -> None:
    path = f"{SCHEDULE}.cacheBlockSize"
    size = values.integer(path)
    if size % 16 and values.text(_DEVICE_TYPE) != "npu":
        report.warn(f"{path}={size}: not a multiple of 16, which an NPU would refuse")


# what an NPU's attention over a paged cache does not do: (key, values that it can, what to set)
_NPU_LIMITS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (f"{SCHEDULE}.cacheBlockSize", (128,), "128"),
    (f"{RUNTIME}.dtype", ("auto", "bfloat16", "float16"), '"auto", "bfloat16" or "float16"'),
    (f"{RUNTIME}.kvCacheDtype", ("auto",), '"auto"'),
)


def _npu(values: Values, report: Report) -> None:
    if values.text(_DEVICE_TYPE) != "npu":
        return
    for path, possible, legal in _NPU_LIMITS:
        value = values.raw(path)
        if value not in possible:
            report.refuse(path, value, "not possible on an NPU", legal, (_DEVICE_TYPE, "npu"))


def _fp8(values: Values, report: Report) -> None:
    path, device_type = f"{RUNTIME}.linearDtype", values.text(_DEVICE_TYPE)
    if values.text(path) != "fp8":
        return
    if device_type in ("cpu", "npu"):
        legal = '"auto", or deviceType "cuda"'
        report.refuse(path, "fp8", "only NVIDIA GPUs compute in it", legal, (_DEVICE_TYPE, device_type))
    dtype = f"{RUNTIME}.dtype"
    if values.text(dtype) == "float32":
        report.refuse(path, "fp8", "made of weights in 16 bits", '"auto"', (dtype, "float32"))


RULES: tuple[Rule, ...] = (
    Rule((_DEVICES, f"{BACKEND}.modelInstanceNumber"), _device_lists),
    Rule((_DEVICES, _WORLD, _MULTI_NODE), _devices_per_instance),
    Rule((_PREFILL_TOKENS, _MAX_INPUT), _prefill_fits_prompt),
    _at_most_max_batch("maxPrefillBatchSize"),
    _at_most_max_batch("maxPreemptCount"),
    _at_most_max_batch("maxN"),
    Rule((f"{SCHEDULE}.maxPreemptCount", f"{MODEL}.cpuMemSize"), _swap_needs_memory),
    Rule((_MAX_SEQ, _MAX_INPUT), _lengths),
    Rule((_MAX_SEQ, f"{SCHEDULE}.maxIterTimes"), _output_fits),
    Rule((_WORLD, _MULTI_NODE, *(f"{MODEL}.{key}" for key in ("tp", "dp", "cp", "sp", "pp"))), _parallel),
    Rule((_WORLD, _MULTI_NODE, _MOE_EP, _MOE_TP), _experts_parallel),
    Rule(
        (_WORLD, _MULTI_NODE, *(f"{MODEL}.{key}" for key in ("dp", "cp", "sp"))),
        _attention_divided_by_heads,
    ),
    Rule((_TEMPLATE, PLUGIN_PARAMS), _mix_and_splitfuse),
    Rule((f"{SERVER}.port", f"{BACKEND}.multiNodesInferPort"), _node_port),
    _all_zero("ipAddress"),
    _all_zero("managementIpAddress"),
    Rule(
        (PLUGIN_PARAMS, f"{SCHEDULE}.stageSelectPolicy", f"{SCHEDULE}.dynamicBatchSizeEnable"),
        _splitfuse_company,
    ),
    Rule((f"{SCHEDULE}.maxLongPartialPrefills", f"{SCHEDULE}.maxNumPartialPrefills"), _partial_prefills),
    Rule((f"{SCHEDULE}.prefillChunkSize", _PREFILL_TOKENS, _TEMPLATE), _chunk_fits),
    Rule(
        tuple(
            f"{SERVER}.{key}"
            for key in ("ipAddress", "managementIpAddress", "port", "managementPort", "metricsPort")
        ),
        _layout,
    ),
    Rule((f"{SCHEDULE}.cacheBlockSize", _DEVICE_TYPE), _block_size),
    Rule((_DEVICE_TYPE, *(path for path, _, _ in _NPU_LIMITS)), _npu),
    Rule((_DEVICE_TYPE, f"{RUNTIME}.linearDtype", f"{RUNTIME}.dtype"), _fp8),
)


def server_addresses(values: Values) -> tuple[str, str]:
    """Bind addresses of the business and the other two planes, without brackets."""
    business = values.text(f"{SERVER}.ipAddress")
    management = values.raw(f"{SERVER}.managementIpAddress")
    return str(parse_address(business)), str(
        parse_address(management if management is not None else business)
    )


def server_ports(values: Values) -> tuple[int, int, int]:
    """Ports of business, management, metrics."""
    port = values.integer(f"{SERVER}.port")
    management = values.maybe_integer(f"{SERVER}.managementPort")
    return port, port if management is None else management, values.integer(f"{SERVER}.metricsPort")


# --- what this build does not do ---


class Unsupported(NamedTuple):
    path: str
    supported: tuple[Any, ...]
    set_instead: str

    def check(self, values: Values, report: Report) -> None:
        value = values.raw(self.path)
        if (value.lower() if isinstance(value, str) else value) not in self.supported:
            report.refuse(self.path, value, "not supported by this build", self.set_instead)


# of the ways to divide a model among the devices of an instance; one device leaves nothing to divide
UNSUPPORTED_DIVISIONS: tuple[Unsupported, ...] = (
    Unsupported(f"{MODEL}.dp", (-1, 1), "1, or more instances (modelInstanceNumber) instead"),
    Unsupported(f"{MODEL}.cp", (1,), "1, and a larger tp instead"),
    Unsupported(f"{MODEL}.sp", (1,), "1"),
)

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(f"{SERVER}.inferMode", ("standard",), '"standard"'),
    Unsupported(f"{SERVER}.distDPServerEnabled", (False,), "false"),
    Unsupported(f"{SERVER}.layerwiseDisaggregated", (False,), "false"),
    Unsupported(_MULTI_NODE, (False,), "false"),
    Unsupported(f"{KV_POOL}.backend", ("",), '""'),
    Unsupported(f"{SCHEDULE}.distributedEnable", (False,), "false"),
)

_LATER = "not available in this build yet; running without"

# Accepted, but nothing comes of it: (key, values that ask for nothing, what the log says).
WITHOUT_EFFECT: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (f"{BACKEND}.backendName", ("mindieservice_llm_engine",), "ignored, there is one engine only"),
    (f"{SERVER}.openAiSupport", ("vllm",), "not available in this build yet; answering in the vLLM flavour"),
    (f"{MODEL}.backendType", ("atb", "torch"), "ignored, the PyTorch engine is used"),
    (f"{MODEL}.modelInstanceType", ("Standard", "StandardMock"), "treated as Standard"),
    (f"{MODEL}.trustRemoteCode", (False,), "security: this would let code from the weight directory run"),
    (f"{SCHEDULE}.supportSelectBatch", (False,), _LATER),
    (f"{SCHEDULE}.stageSelectPolicy", (0,), _LATER),
    (f"{SCHEDULE}.dynamicBatchSizeEnable", (False,), _LATER),
    (f"{SCHEDULE}.policyType", (0,), "without effect, ignored"),
    (f"{SCHEDULE}.bufferResponseEnabled", (False,), "without effect, ignored"),
)
