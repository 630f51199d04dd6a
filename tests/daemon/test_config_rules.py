"""One test for each rule between values, and for what this build cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.settings import MixSettings
from tests.daemon.config_home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.server["httpsEnabled"] = False
    return home


@pytest.mark.parametrize(("devices", "number"), [([[0], [1]], 1), ([[0]], 2), ([], 1)])
def test_r1_one_device_list_per_instance(home: Home, devices: list[list[int]], number: int) -> None:
    home.backend.update(npuDeviceIds=devices, modelInstanceNumber=number)
    assert "modelInstanceNumber" in home.only_finding()


def test_r2_duplicate_ids(home: Home) -> None:
    home.backend["npuDeviceIds"] = [[0, 0]]
    home.model["worldSize"] = 2
    assert any("npuDeviceIds[0]=[0, 0]: duplicate device ids" in finding for finding in home.findings())


def test_r2_count_is_world_size(home: Home) -> None:
    home.backend["npuDeviceIds"] = [[0, 1]]
    finding = home.only_finding()
    assert "2 device ids; allowed: 1 distinct ids" in finding and "worldSize=1" in finding


def test_r2_an_id_belongs_to_one_instance(home: Home) -> None:
    home.backend.update(npuDeviceIds=[[0], [0]], modelInstanceNumber=2)
    assert "npuDeviceIds[1]=[0]: device ids [0] already belong" in home.only_finding()


def test_r3_prefill_step_holds_the_longest_prompt(home: Home) -> None:
    home.schedule["maxPrefillTokens"] = 1024
    assert home.only_finding() == (
        "[config] BackendConfig.ScheduleConfig.maxPrefillTokens=1024: smaller than "
        "BackendConfig.ModelDeployConfig.maxInputTokenLen=2048; allowed: [2048, 4194304], or any with "
        "templateType Mix"
    )


def test_mix_lifts_r3_and_keeps_the_step_as_it_is(home: Home) -> None:
    home.schedule.update(maxPrefillTokens=512, templateType="Mix", maxNumPartialPrefills=4)
    home.model["plugin_params"] = json.dumps({"plugin_type": "prefix_cache, splitfuse"})
    settings = home.load().schedule
    assert settings.max_prefill_tokens == 512 and settings.prefix_cache
    assert settings.mix == MixSettings(chunk_size=0, max_partial=4, long_threshold=1024, max_long_partial=4)
    home.schedule.update(prefillChunkSize=64, maxLongPartialPrefills=2, longPrefillTokenThreshold=100)
    assert home.load().schedule.mix == MixSettings(64, 4, 100, 2)
    assert not [warning for warning in home.load().warnings if "not available" in warning]


@pytest.mark.parametrize("key", ["maxPrefillBatchSize", "maxPreemptCount", "maxN"])
def test_r4_r5_r6_at_most_max_batch(home: Home, key: str) -> None:
    home.model["cpuMemSize"] = 1
    home.schedule[key] = 200
    home.load()
    home.schedule[key] = 201
    assert f"{key}=201: larger than BackendConfig.ScheduleConfig.maxBatchSize=200" in home.only_finding()


def test_r5_swapping_needs_host_memory(home: Home) -> None:
    home.schedule["maxPreemptCount"] = 1
    finding = home.only_finding()
    assert "cpuMemSize=0" in finding and "maxPreemptCount=1" in finding


def test_r7_output_fits_the_sequence(home: Home) -> None:
    home.schedule["maxIterTimes"] = 2560
    home.load()
    home.schedule["maxIterTimes"] = 2561
    assert "maxIterTimes=2561" in home.only_finding()


def test_r7_prompt_longer_than_sequence_is_a_warning(home: Home) -> None:
    home.deploy["maxInputTokenLen"] = 4096
    assert "prompts are limited to 2559" in home.warning("maxInputTokenLen=4096")


def test_r7_one_token_is_no_sequence(home: Home) -> None:
    home.deploy["maxSeqLen"] = 1
    assert any("maxSeqLen=1: no room" in finding for finding in home.findings())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tp": 2}, "tp=2"),
        ({"dp": 2}, "worldSize=1"),
        ({"cp": 2}, "worldSize=1"),
        ({"sp": 2}, "sp=2"),
        ({"pp": 2}, "pp=2"),
        ({"dp": 0}, "dp=0"),
        ({"moe_ep": 2}, "moe_ep=2"),
        ({"moe_tp": 2}, "moe_tp=2"),
        ({"moe_ep": 1, "moe_tp": 2}, "moe_ep=1"),
    ],
)
def test_r8_parallel_sizes_multiply_to_world_size(home: Home, changes: dict[str, int], key: str) -> None:
    home.model.update(changes)
    assert key in home.only_finding()


def test_r8_context_and_data_parallel_exclude_each_other(home: Home) -> None:
    home.model.update(cp=2, dp=2)
    assert any("cp=2: context parallel needs dp=1" in finding for finding in home.findings())


def test_r8_all_ones_are_consistent(home: Home) -> None:
    home.model.update(tp=1, dp=-1, cp=1, sp=1, pp=1, moe_ep=1, moe_tp=1)
    home.load()


def test_r9_mix_and_splitfuse_need_each_other(home: Home) -> None:
    home.schedule["templateType"] = "Mix"
    assert "needs splitfuse" in home.only_finding()
    home.model["plugin_params"] = {"plugin_type": "splitfuse"}
    home.load()
    home.schedule["templateType"] = "Standard"
    assert "needs templateType Mix" in home.only_finding()


def test_r10_node_port_is_not_the_business_port(home: Home) -> None:
    home.backend["multiNodesInferPort"] = 1025
    assert "ServerConfig.port=1025" in home.only_finding()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "[::]", "::ffff:0.0.0.0"])
@pytest.mark.parametrize("key", ["ipAddress", "managementIpAddress"])
def test_r11_listening_everywhere_must_be_allowed(home: Home, key: str, address: str) -> None:
    home.server[key] = address
    finding = home.only_finding()
    assert f"{key}=" in finding and "allowAllZeroIpListening=false" in finding
    home.server["allowAllZeroIpListening"] = True
    home.load()


@pytest.mark.parametrize("changes", [{"stageSelectPolicy": 2}, {"dynamicBatchSizeEnable": True}])
def test_r13_not_with_splitfuse(home: Home, changes: dict[str, object]) -> None:
    home.schedule.update(templateType="Mix", **changes)
    home.model["plugin_params"] = {"plugin_type": "splitfuse"}
    assert "cannot be combined with splitfuse" in home.only_finding()


def test_r15_partial_prefills(home: Home) -> None:
    home.schedule["maxNumPartialPrefills"] = 4
    home.load()  # the default of maxLongPartialPrefills, 8, follows
    home.schedule["maxLongPartialPrefills"] = 5
    assert "maxLongPartialPrefills=5" in home.only_finding()


def test_r15_chunk_fits_prefill_step(home: Home) -> None:
    home.schedule["prefillChunkSize"] = 512
    assert "unless templateType is Mix" in home.warning("prefillChunkSize=512")
    home.schedule["prefillChunkSize"] = 8193
    assert "prefillChunkSize=8193" in home.only_finding()


def test_ports_without_a_layout(home: Home) -> None:
    home.server.update(managementIpAddress="127.0.0.1", metricsPort=1025)
    assert "metricsPort=1025" in home.only_finding()


def test_block_size_multiple_of_16(home: Home) -> None:
    home.schedule["cacheBlockSize"] = 24
    assert "not a multiple of 16" in home.warning("cacheBlockSize=24")
    home.environ = {"MINDIE_DEVICE_TYPE": "npu"}
    assert "cacheBlockSize=24" in home.only_finding()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("schedule", "cacheBlockSize", 64),
        ("runtime", "dtype", "float32"),
        ("runtime", "kvCacheDtype", "int8"),
    ],
)
def test_what_an_npu_cannot_do(home: Home, section: str, key: str, value: object) -> None:
    members = home.schedule if section == "schedule" else home.backend.setdefault("runtimeConfig", {})
    members[key] = value
    home.load()
    home.environ = {"MINDIE_DEVICE_TYPE": "npu"}
    finding = home.only_finding()
    assert key in finding and "NPU" in finding and "deviceType" in finding


@pytest.mark.parametrize("device_type", ["cpu", "npu"])
def test_fp8_is_for_gpus(home: Home, device_type: str) -> None:
    home.backend.setdefault("runtimeConfig", {})["linearDtype"] = "fp8"
    home.load()
    home.environ = {"MINDIE_DEVICE_TYPE": device_type}
    finding = home.only_finding()
    assert "linearDtype" in finding and "deviceType" in finding and '"auto"' in finding
    home.environ = {"MINDIE_DEVICE_TYPE": "cuda"}
    home.load()
    home.backend["runtimeConfig"]["dtype"] = "float32"
    assert "16 bits" in home.only_finding()


def test_rules_wait_for_valid_inputs(home: Home) -> None:
    home.deploy["maxInputTokenLen"] = "2048"
    home.schedule["maxPrefillTokens"] = 1
    assert "maxInputTokenLen" in home.only_finding()


# --- plugin_params ---


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", 'no string "plugin_type"'),
        ("{}", 'no string "plugin_type"'),
        ('{"plugin_type": 1}', 'no string "plugin_type"'),
        ('{"plugin_type": "a", "plugin_type": "b"}', "more than once"),
        ('{"plugin_type": "prefix_cach"}', "did you mean prefix_cache?"),
        (
            '{"plugin_type": "mtp,prefix_cache", "num_speculative_tokens": 1}',
            "mtp is not supported by this build",
        ),
        ('{"plugin_type": "la, memory_decoding"}', "la and memory_decoding exclude each other"),
        ('{"plugin_type": "memory_decoding", "dynamic_algo": true}', "decoding_length=<absent>: required"),
        (
            '{"plugin_type": "memory_decoding", "dynamic_algo": true, "decoding_length": 17}',
            "decoding_length=17: not allowed; allowed: [1, 16]",
        ),
        (
            '{"plugin_type": "memory_decoding", "dynamic_algo": 1, "decoding_length": 1}',
            "dynamic_algo=1: not allowed; allowed: true or false",
        ),
        (
            '{"plugin_type": "la", "level": 4, "window": 5, "guess_set_size": 5}',
            "speculationGamma=0: la guesses up to 30 tokens a step; allowed: [30, ...]",
        ),
        ('{"plugin_type": "prefix_cache", "x": ' + "[" * 10 + "]" * 10 + "}", "nested too deeply"),
        ('{"plugin_type": "prefix_cache"}' + " " * 1024, "characters long"),
        (5, "must be a string holding JSON, or an object, not an integer"),
    ],
)
def test_plugin_params_refused(home: Home, given: object, part: str) -> None:
    home.model["plugin_params"] = given
    assert part in home.only_finding()


@pytest.mark.parametrize("given", ["", {}, '{"plugin_type": ""}'])
def test_no_plugin(home: Home, given: object) -> None:
    home.model["plugin_params"] = given
    assert not [
        warning for warning in home.load().warnings if "plugin" in warning and "without effect" not in warning
    ]


@pytest.mark.parametrize(
    ("params", "length"),
    [
        ({"plugin_type": "memory_decoding", "decoding_length": 16, "dynamic_algo": True}, 16),
        ({"plugin_type": "prefix_cache, la", "level": 4, "window": 5, "guess_set_size": 5}, 3),
        ({"plugin_type": "prefix_cache"}, 0),
    ],
)
def test_how_many_tokens_are_guessed(home: Home, params: dict[str, object], length: int) -> None:
    home.model["plugin_params"] = json.dumps(params)
    home.deploy["speculationGamma"] = 30
    assert home.load().schedule.guess_length == length


@pytest.mark.parametrize(("given", "on"), [("", False), ('{"plugin_type": "prefix_cache"}', True)])
def test_plugin_params_switch_the_prefix_cache_on(home: Home, given: str, on: bool) -> None:
    home.model["plugin_params"] = given
    settings = home.load()
    assert settings.schedule.prefix_cache == on
    assert not [warning for warning in settings.warnings if "prefix_cache" in warning]


# --- this build ---


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("server", {"inferMode": "dmi"}),
        ("server", {"distDPServerEnabled": True}),
        ("server", {"layerwiseDisaggregated": True}),
        ("backend", {"multiNodesInferEnabled": True}),
        ("backend", {"kvPoolConfig": {"backend": "mooncake"}}),
        ("schedule", {"distributedEnable": True}),
    ],
)
def test_unsupported_is_refused_with_what_to_set(
    home: Home, section: str, changes: dict[str, object]
) -> None:
    getattr(home, section).update(changes)
    finding = home.only_finding()
    assert "not supported by this build; allowed: " in finding
    assert next(iter(changes)) in finding


@pytest.mark.parametrize("tp", [{}, {"tp": 2}, {"tp": 2, "dp": -1, "cp": 1, "moe_tp": 2}])
def test_ranks_may_divide_a_model(home: Home, tp: dict[str, int]) -> None:
    home.backend["npuDeviceIds"] = [[0, 1]]
    home.model.update(worldSize=2, **tp)
    settings = home.load()
    assert settings.model.world_size == 2 and settings.device_ids == ((0, 1),)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, 1),
        ({"moe_tp": 4}, 1),
        ({"moe_tp": 2}, 2),
        ({"moe_tp": 1}, 4),
        ({"moe_ep": 4}, 4),
        ({"moe_ep": 2, "moe_tp": 2}, 2),
    ],
)
def test_experts_may_be_dealt_to_groups_of_ranks(home: Home, changes: dict[str, int], groups: int) -> None:
    home.backend["npuDeviceIds"] = [[0, 1, 2, 3]]
    home.model.update(worldSize=4, **changes)
    assert home.load().model.moe_ep == groups


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"moe_ep": 3}, "moe_ep=3: no divisor of worldSize"),
        ({"moe_tp": 8}, "moe_tp=8: no divisor of worldSize"),
        ({"moe_ep": 2, "moe_tp": 4}, "moe_ep=2: moe_ep*moe_tp = 2*4 = 8"),
    ],
)
def test_groups_for_experts_that_are_no_share_of_the_ranks(
    home: Home, changes: dict[str, int], says: str
) -> None:
    home.backend["npuDeviceIds"] = [[0, 1, 2, 3]]
    home.model.update(worldSize=4, **changes)
    assert says in home.only_finding()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dp": 2, "tp": 1}, "dp=2: not supported by this build; allowed: 1, or more instances"),
        ({"cp": 2, "tp": 1}, "cp=2: not supported by this build; allowed: 1, and a larger tp instead"),
        ({"sp": 2}, "sp=2: not supported by this build"),
    ],
)
def test_ranks_divide_a_model_in_no_other_way(home: Home, changes: dict[str, int], key: str) -> None:
    home.backend["npuDeviceIds"] = [[0, 1]]
    home.model.update(worldSize=2, **changes)
    assert key in home.only_finding()


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("schedule", {"stageSelectPolicy": 1}),
        ("schedule", {"stageSelectPolicy": 2}),
        ("schedule", {"supportSelectBatch": True}),
        ("schedule", {"dynamicBatchSizeEnable": True}),
        ("server", {"openAiSupport": "openai"}),
    ],
)
def test_what_only_changes_speed_is_announced(home: Home, section: str, changes: dict[str, object]) -> None:
    getattr(home, section).update(changes)
    (name, value), *_ = changes.items()
    innermost = next(iter(value)) if isinstance(value, dict) else name
    assert "not available in this build yet" in home.warning(innermost)


def test_swapping_is_switched_on_by_its_count(home: Home) -> None:
    home.schedule["maxPreemptCount"] = 1
    home.model["cpuMemSize"] = 1
    assert home.load().schedule.max_preempt_count == 1
    assert not [warning for warning in home.load().warnings if "maxPreemptCount" in warning]


def test_remote_code_and_plain_http_are_security_warnings(home: Home) -> None:
    home.model["trustRemoteCode"] = True
    assert "security" in home.warning("trustRemoteCode")
    assert "security" in home.warning("httpsEnabled=false")
