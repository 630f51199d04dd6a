"""config.json as a whole: where it is found, what it becomes, and that all mistakes are told at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon.config import load_settings
from daemon.config_report import ConfigError
from daemon.config_schema import MODEL, SECTIONS, SERVER
from engine.errors import EXIT_CONFIG
from engine.settings import ScheduleSettings
from tests.daemon.config_home import REPO, Home, deny


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Plain HTTP, so that tests need certificates only where they are about them."""
    home = Home(tmp_path)
    home.server["httpsEnabled"] = False
    return home


# --- the shipped file ---


def test_shipped_file_loads_where_certificates_and_model_are(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.put_tls_files()
    settings = home.load()
    assert settings.model.weight_path == tmp_path / "models" / "mindie-tiny"
    assert settings.device_ids == ((0,),)
    assert settings.schedule == ScheduleSettings(
        block_size=128,
        max_prefill_batch_size=50,
        max_prefill_tokens=8192,
        max_batch_size=200,
        max_iter_times=512,
        max_queue_delay_us=5000,
        max_first_token_wait_ms=2500,
        max_n=50,
        max_seq_len=2560,
        max_input_len=2048,
        truncation="off",
    )
    assert [
        (*listener.planes, listener.address, listener.port) for listener in settings.endpoint.listeners
    ] == [
        ("business", "127.0.0.1", 1025),
        ("management", "127.0.0.2", 1026),
        ("metrics", "127.0.0.2", 1027),
    ]
    business = settings.endpoint.listeners[0].tls
    assert business is not None
    assert business.key_file == tmp_path / "security/keys/server.key.pem"
    assert business.crl_files == (tmp_path / "security/certs/server_crl.pem",)
    assert business.key_password_file is None
    assert settings.endpoint.max_request_bytes == 40 * 2**20
    assert settings.endpoint.openai_flavour == "vllm"


def test_shipped_file_warns_of_nothing_but_stock_keys_without_effect(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.put_tls_files()
    (warning,) = home.load().warnings
    assert "without effect" in warning
    assert "interCommTLSEnabled" in warning and "kmcKsfMaster" in warning


def test_original_stock_file_on_a_bare_host_lists_everything(tmp_path: Path) -> None:
    """The file as the original ships it, for four devices: a model that is not here, no certificates."""
    home = Home(tmp_path)
    home.backend["npuDeviceIds"] = [[0, 1, 2, 3]]
    home.model.update(modelName="llama_65b", modelWeightPath="/data/weights/llama1-65b", worldSize=4)
    findings = home.findings()
    for part in ("modelWeightPath", "tlsCert", "tlsPk", "tlsCaFile[0]", "tlsCrlFiles[0]"):
        assert any(part in finding for finding in findings), part
    certificate = next(finding for finding in findings if "ServerConfig.tlsCert=" in finding)
    assert str(tmp_path / "security/certs/server.pem") in certificate
    assert "or set httpsEnabled=false" in certificate


# --- corpus: files that must load, and what must follow from them ---

CORPUS: dict[str, tuple[dict[str, Any], dict[str, Any], str, Any]] = {
    "minimal log": ({"LogConfig": {}}, {}, "log.valid_hours", 2),
    "two instances": (
        {"BackendConfig": {"modelInstanceNumber": 2, "npuDeviceIds": [[0], [1]]}},
        {},
        "device_ids",
        ((0,), (1,)),
    ),
    "older inferMode spelling": ({"ServerConfig": {"inferMode": "Standard"}}, {}, "model.world_size", 1),
    "native flavour": (
        {"ServerConfig": {"openAiSupport": "openai"}},
        {},
        "endpoint.openai_flavour",
        "openai",
    ),
    "bracketed address": (
        {"ServerConfig": {"ipAddress": "[::1]"}},
        {},
        "endpoint.listeners",
        ["::1", "127.0.0.2", "127.0.0.2"],
    ),
    "runtime section": (
        {"BackendConfig": {"runtimeConfig": {"deviceType": "cpu", "kvCacheBlockNum": 64}}},
        {},
        "model.kv_block_num",
        64,
    ),
    "metrics off": ({}, {"MIES_SERVICE_MONITOR_MODE": "0"}, "endpoint.metrics_enabled", False),
    "container address": (
        {},
        {"MIES_CONTAINER_IP": "10.1.2.3", "MIES_CONTAINER_MANAGEMENT_IP": "10.1.2.3"},
        "endpoint.listeners",
        ["10.1.2.3", "10.1.2.3", "10.1.2.3"],
    ),
    "devices from the environment": ({}, {"NPU_DEVICE_IDS": "[[5]]"}, "device_ids", ((5,),)),
    "device type from the environment": ({}, {"MINDIE_DEVICE_TYPE": "cpu"}, "model.device_type", "cpu"),
    "memory fraction": ({}, {"NPU_MEMORY_FRACTION": "0.5"}, "model.memory_fraction", 0.5),
    "raised timeouts": ({"EnableDynamicAdjustTimeoutConfig": True}, {}, "endpoint.token_timeout_s", 3600),
    "byte order mark": ({}, {}, "model.name", "mindie-tiny"),
    "longest socket directory": (
        {"BackendConfig": {"runtimeConfig": {"ipcDir": "/" + "d" * 59}}},
        {},
        "ipc_dir",
        Path("/" + "d" * 59),
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(home: Home, name: str) -> None:
    changes, environ, slot, expected = CORPUS[name]
    for section, members in changes.items():
        if isinstance(members, dict):
            home.document.setdefault(section, {}).update(members)
        else:
            home.document[section] = members
    home.environ = environ
    text = json.dumps(home.document)
    found: Any = home.load_text("\ufeff" + text if name == "byte order mark" else text)
    for part in slot.split("."):
        found = getattr(found, part)
    if slot == "endpoint.listeners":
        found = [listener.address for listener in found]
    assert found == expected


def test_absent_optional_keys_take_their_documented_defaults(home: Home) -> None:
    for name in (
        "managementIpAddress",
        "managementPort",
        "metricsPort",
        "tokenTimeout",
        "e2eTimeout",
        "openAiSupport",
    ):
        del home.server[name]
    del home.document["LogConfig"]
    settings = home.load()
    assert [(*listener.planes, listener.port) for listener in settings.endpoint.listeners] == [
        ("business", "management", 1025),
        ("metrics", 1027),
    ]
    assert {listener.address for listener in settings.endpoint.listeners} == {"127.0.0.1"}
    assert (settings.endpoint.token_timeout_s, settings.endpoint.e2e_timeout_s) == (600, 600)
    assert settings.log.dynamic_level == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [(False, "off"), (0, "off"), (True, "keep_head"), (-1, "keep_head"), (1, "keep_tail")],
)
def test_truncation_tells_true_from_one(home: Home, given: bool | int, expected: str) -> None:
    home.deploy["truncation"] = given
    assert home.load().schedule.truncation == expected


# --- types, ranges, names ---


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("port", "1025", "must be an integer, not a string"),
        ("port", 80, "out of range; allowed: [1024, 65535]"),
        ("port", 1025.0, "must be an integer"),
        ("port", None, "not null"),
        ("maxLinkNum", True, "must be an integer, not a boolean"),
        ("maxLinkNum", -1, "out of range"),
        ("httpsEnabled", 1, "must be true or false"),
        ("ipAddress", "localhost", "host names are not accepted"),
        ("inferMode", "mixed", "malformed"),
    ],
)
def test_wrong_value(home: Home, key: str, value: object, part: str) -> None:
    home.server[key] = value
    finding = home.only_finding()
    assert finding.startswith(f"[config] ServerConfig.{key}={json.dumps(value)}: ")
    assert part in finding


def test_every_integer_key_refuses_a_boolean_and_what_lies_beyond_its_range(home: Home) -> None:
    """Over the whole table, so that no row is written in a way that checks nothing."""
    sections = {"": home.document, MODEL: home.model}
    for section in SECTIONS:
        members = sections.get(section.path)
        if members is None:
            members = home.document
            for part in section.path.split("."):
                members = members.setdefault(part, {})
        for key in (key for key in section.keys if key.kind == "int"):
            before = members.get(key.name)
            for wrong in (True, key.high + 1, key.low - 1):
                if wrong in key.also and wrong is not True:
                    continue
                members[key.name] = wrong
                where = f"{section.path}.{key.name}={json.dumps(wrong)}:"
                assert any(where in finding for finding in home.findings()), where
            if before is None:
                del members[key.name]
            else:
                members[key.name] = before


def test_every_required_key_is_missed(home: Home) -> None:
    home.document["ServerConfig"] = {}
    home.backend["ScheduleConfig"] = {}
    findings = home.findings()
    required = [
        f"{section.path}.{key.name}"
        for section in SECTIONS
        if section.path in (SERVER, "BackendConfig.ScheduleConfig")
        for key in section.keys
        if key.name in {"port", "ipAddress", "httpsEnabled", "maxLinkNum", "cacheBlockSize", "maxBatchSize"}
    ]
    for key in required:
        assert any(finding.startswith(f"[config] {key}=<absent>") for finding in findings), key


def test_missing_section_is_one_finding(home: Home) -> None:
    del home.backend["ScheduleConfig"]
    assert home.only_finding() == (
        "[config] BackendConfig.ScheduleConfig=<absent>: required key is missing; allowed: an object"
    )


@pytest.mark.parametrize("models", [[], "x", [{}, {}], [1]])
def test_exactly_one_model(home: Home, models: object) -> None:
    home.deploy["ModelConfig"] = models
    assert "exactly one object" in home.only_finding()


def test_unknown_keys_are_one_warning_with_suggestions(home: Home) -> None:
    home.server["tokenTimeOut"] = 5
    home.schedule["maxSeqLen"] = 5
    home.model["somethingNew"] = {"a": 1}
    warning = home.warning("unknown keys")
    assert "ServerConfig.tokenTimeOut (did you mean tokenTimeout?)" in warning
    assert "ScheduleConfig.maxSeqLen (belongs to BackendConfig.ModelDeployConfig)" in warning
    assert "ModelConfig[0].somethingNew" in warning


@pytest.mark.parametrize("version", ["2.0.0", 1, None])
def test_other_version_is_a_warning(home: Home, version: object) -> None:
    home.document["Version"] = version
    assert f"Version={json.dumps(version)}" in home.warning("Version=")


def test_misspelt_required_key_is_pointed_out(home: Home) -> None:
    home.schedule["maxPrefilTokens"] = home.schedule.pop("maxPrefillTokens")
    assert "is maxPrefilTokens a misspelling of it?" in home.only_finding()


def test_unknown_runtime_member_is_refused(home: Home) -> None:
    home.backend["runtimeConfig"] = {"deviceTyp": "cpu"}
    assert "did you mean deviceType?" in home.only_finding()


def test_older_layout_is_refused_with_a_hint(home: Home) -> None:
    home.backend["ScheduleParam"] = {"maxBatchSize": 1}
    assert "allowed: BackendConfig.ScheduleConfig" in home.only_finding()


def test_keys_of_switched_off_features_are_not_looked_at(home: Home) -> None:
    home.server.update(tlsCert=5, interCommTlsCaFiles=5, kmcKsfMaster=5)
    home.backend["interNodeTlsCaFiles"] = 5
    home.load()


# --- everything at once ---


def test_all_stages_report_in_one_run(home: Home) -> None:
    home.server.update(port=80, httpsEnabled=True)
    home.server["managementPort"] = "1026"
    home.schedule.update(maxPrefillTokens=1024, maxIterTimes=5000)
    home.model["modelWeightPath"] = "/nowhere"
    home.environ = {"NPU_MEMORY_FRACTION": "1.5"}
    with pytest.raises(ConfigError) as caught:
        home.load()
    assert caught.value.exit_code == EXIT_CONFIG
    *findings, last = str(caught.value).splitlines()
    assert findings == list(caught.value.findings)
    assert all(finding.startswith("[config] ") and "; allowed: " in finding for finding in findings)
    for part in (
        "port=80",
        'managementPort="1026"',
        "maxPrefillTokens=1024",
        "maxIterTimes=5000",
        "/nowhere",
    ):
        assert any(part in finding for finding in findings), part
    assert any("NPU_MEMORY_FRACTION" in finding for finding in findings)
    assert last == f"{home.file}: {len(findings)} errors"


def test_findings_never_span_lines(home: Home) -> None:
    home.model["modelName"] = "a\nb\ud800"
    home.backend["runtimeConfig"] = {"x\ny": 1}
    with pytest.raises(ConfigError) as caught:
        home.load()
    text = str(caught.value)
    assert len(text.splitlines()) == len(caught.value.findings) + 1
    text.encode("utf-8")


# --- lookup and file checks ---


def _load(config_file: Path | None, environ: dict[str, str], root: Path) -> Path:
    return load_settings(config_file, environ, root / "bin" / "mindieservice_daemon").config_file


def test_lookup_order(home: Home, tmp_path: Path) -> None:
    text = json.dumps(home.document)
    option = home.put("option.json", text)
    variable = home.put("variable.json", text)
    in_tree = home.put("config.json", text)
    environ = {"MIES_CONFIG_JSON_PATH": str(variable)}
    assert _load(option, environ, tmp_path) == option
    assert _load(None, environ, tmp_path) == variable
    assert _load(None, {}, tmp_path) == in_tree
    installed = home.put("conf/config.json", text)
    assert _load(None, {}, tmp_path) == installed
    other = Home(tmp_path / "other")
    other.put("conf/config.json", text)
    assert _load(None, {"MINDIE_LLM_HOME_PATH": str(other.root)}, tmp_path) == other.file
    assert _load(None, {"MIES_INSTALL_PATH": str(other.root)}, tmp_path) == other.file


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_file_that_cannot_be_looked_at_is_not_skipped(
    home: Home, tmp_path: Path, error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = home.put("conf/config.json", json.dumps(home.document))
    in_tree = home.put("config.json", json.dumps(home.document))
    deny(monkeypatch, installed.parent, error)
    if error is FileNotFoundError:
        assert _load(None, {}, tmp_path) == in_tree
    else:
        with pytest.raises(ConfigError, match=f"{installed}.*Permission denied"):
            _load(None, {}, tmp_path)


@pytest.mark.parametrize("variable", ["MIES_CONFIG_JSON_PATH", "MINDIE_LLM_HOME_PATH"])
def test_broken_candidate_is_not_skipped(home: Home, tmp_path: Path, variable: str) -> None:
    home.put("conf/config.json", json.dumps(home.document))
    with pytest.raises(ConfigError, match=variable):
        _load(None, {variable: str(tmp_path / "nowhere")}, tmp_path)


def test_relative_paths_count_from_the_root_not_the_working_directory(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert home.load().model.weight_path == tmp_path / "models" / "mindie-tiny"
    home.model["modelWeightPath"] = str(home.model_dir)
    assert home.load().model.weight_path == home.model_dir


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "0 bytes long"),
        (b"\xff{}", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"{} // comment", "not valid JSON"),
        (b"[]", "holds no JSON object"),
        (b" " * (10 * 2**20 + 1), "bytes long"),
    ],
)
def test_unusable_file(home: Home, tmp_path: Path, content: bytes, part: str) -> None:
    file = home.put("bad.json")
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=part) as caught:
        _load(file, {}, tmp_path)
    assert str(caught.value).endswith(f"{file}: 1 error")


def test_directory_is_no_config_file(home: Home, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a regular file"):
        _load(tmp_path, {}, tmp_path)


def test_duplicate_keys_and_nan_are_named_with_their_paths(home: Home) -> None:
    text = json.dumps(home.document)
    text = text.replace('"port": 1025', '"port": 1025, "port": 1026').replace(
        '"worldSize": 1', '"worldSize": NaN'
    )
    with pytest.raises(ConfigError) as caught:
        home.load_text(text)
    first, second = caught.value.findings
    assert first.startswith("[config] ServerConfig.port=1026: ") and "more than once" in first
    assert "ModelConfig[0].worldSize=NaN: " in second


# --- environment ---


def test_applied_override_leaves_one_line(home: Home) -> None:
    home.environ = {"NPU_DEVICE_IDS": "[[3]]"}
    assert home.note("NPU_DEVICE_IDS").startswith("BackendConfig.npuDeviceIds=[[3]]")


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("MIES_CONTAINER_IP", "pod-1", "host names are not accepted"),
        ("MIES_CONTAINER_IP", "0.0.0.0", "every address"),
        ("NPU_DEVICE_IDS", "[[0,1]]", "2 device ids"),
        ("NPU_DEVICE_IDS", "[[" * 20 + "]]" * 20, "nested too deeply"),
        ("NPU_DEVICE_IDS", "0", "must be an array of arrays"),
        ("MINDIE_DEVICE_TYPE", "tpu", "not one of the allowed values"),
        ("NPU_MEMORY_FRACTION", "nan", "(0, 1]"),
        ("NPU_MEMORY_FRACTION", "much", "(0, 1]"),
    ],
)
def test_bad_override_names_its_variable(home: Home, variable: str, value: str, part: str) -> None:
    home.environ = {variable: value}
    finding = home.only_finding()
    assert variable in finding and part in finding


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"NPU_MEMORY_FRACTION": "0.5"}, "without effect on the CPU"),
        ({"NPU_MEMORY_FRACTION": "0.5", "MINDIE_DEVICE_TYPE": "cpu"}, "without effect on the CPU"),
    ],
)
def test_variables_without_effect_are_told(home: Home, environ: dict[str, str], part: str) -> None:
    home.environ = environ
    assert home.warning(part).startswith(next(iter(environ)))


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"MINDIE_ASYNC_SCHEDULING_ENABLE": "yes"}, "neither 1 (on) nor 0 (off)"),
        ({"MINDIE_LLM_RECOMPUTE_THRESHOLD": "0.5"}, "sequences are always recomputed"),
        ({"LOCAL_CACHE_DIR": "/tmp"}, "no multimodal models"),
        ({"TOKENIZER_ENCODE_TIMEOUT": "30"}, "e2eTimeout limits"),
        ({"MIES_SERVICE_MONITOR_MODE": "2"}, "neither 0 (off) nor 1 (on)"),
    ],
)
def test_variables_that_lead_to_nothing_are_told(home: Home, environ: dict[str, str], part: str) -> None:
    home.environ = environ
    assert home.warning(part).startswith(next(iter(environ)))


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"RANK_TABLE_FILE": "/x", "MASTER_IP": "10.0.0.1"}, "RANK_TABLE_FILE, MASTER_IP: for"),
        ({"MIES_SERVICE_MONITOR_MODE": "0"}, "/metrics is off"),
        ({"MINDIE_ASYNC_SCHEDULING_ENABLE": "1"}, "planned while the one before it is computed"),
        ({"NPU_MEMORY_FRACTION": "0.5", "MINDIE_DEVICE_TYPE": "cuda"}, "NPU_MEMORY_FRACTION=0.5 taken"),
        ({"CUDA_VISIBLE_DEVICES": "3,4", "MINDIE_DEVICE_TYPE": "cuda"}, "CUDA_VISIBLE_DEVICES=3,4"),
    ],
)
def test_variables_in_force_leave_one_note(home: Home, environ: dict[str, str], part: str) -> None:
    home.environ = environ
    home.note(part)


@pytest.mark.parametrize(
    ("value", "on"), [(None, False), ("", False), ("0", False), ("1", True), ("2", False)]
)
def test_asynchronous_scheduling_is_on_with_1_alone(home: Home, value: str | None, on: bool) -> None:
    home.environ = {} if value is None else {"MINDIE_ASYNC_SCHEDULING_ENABLE": value}
    assert home.load().schedule.async_scheduling is on


@pytest.mark.parametrize(
    ("plugin", "fields"),
    [
        ("la", {"level": 4, "window": 2, "guess_set_size": 2}),
        ("memory_decoding", {"decoding_length": 8, "dynamic_algo": True}),
    ],
)
def test_asynchronous_scheduling_and_guessed_tokens_exclude_each_other(
    home: Home, plugin: str, fields: dict[str, object]
) -> None:
    home.model["plugin_params"] = json.dumps({"plugin_type": plugin, **fields})
    home.deploy["speculationGamma"] = 30
    home.load()
    home.environ = {"MINDIE_ASYNC_SCHEDULING_ENABLE": "1"}
    finding = home.only_finding()
    assert "MINDIE_ASYNC_SCHEDULING_ENABLE" in finding and plugin in finding


def test_device_ids_stay_within_the_visible_ones(home: Home) -> None:
    home.backend["npuDeviceIds"] = [[2]]
    home.environ = {"ASCEND_RT_VISIBLE_DEVICES": "4,5", "MINDIE_DEVICE_TYPE": "npu"}
    finding = home.only_finding()
    assert "npuDeviceIds[0]=[2]: device ids [2] beyond the 2 visible devices" in finding
    assert "ASCEND_RT_VISIBLE_DEVICES=4,5" in finding
    home.environ["MINDIE_DEVICE_TYPE"] = "cpu"
    home.load()


def test_stock_values_of_variables_without_effect_are_not_mentioned(home: Home) -> None:
    before = home.load().warnings
    home.environ = {"NPU_MEMORY_FRACTION": "0.8", "MIES_SERVICE_MONITOR_MODE": "0"}
    assert home.load().warnings == before
    home.environ = {"NPU_MEMORY_FRACTION": "0.5", "MINDIE_DEVICE_TYPE": "cuda"}
    assert not [warning for warning in home.load().warnings if "NPU_MEMORY_FRACTION" in warning]


# --- adjustments ---


def test_zero_prefill_batch_means_max_batch(home: Home) -> None:
    home.schedule["maxPrefillBatchSize"] = 0
    assert home.load().schedule.max_prefill_batch_size == 200
    assert "200 is used" in home.note("maxPrefillBatchSize=0")


def test_a_recomputed_sequence_always_fits_one_prefill(home: Home) -> None:
    home.schedule["maxPrefillTokens"] = 2048
    schedule = home.load().schedule
    assert schedule.max_prefill_tokens == min(2560, 2048 + 512)
    assert "2560 is used" in home.note("maxPrefillTokens=2048")


def test_batch_follows_prefill_tokens_and_takes_the_others_along(home: Home) -> None:
    home.deploy.update(maxSeqLen=16, maxInputTokenLen=8)
    home.schedule.update(maxPrefillTokens=16, maxIterTimes=8, maxN=100)
    schedule = home.load().schedule
    assert (schedule.max_batch_size, schedule.max_prefill_batch_size, schedule.max_n) == (16, 16, 16)


@pytest.mark.parametrize(("given", "expected"), [(None, 50), (128, 50), (50, 50), (4, 4)])
def test_all_sequences_of_a_request_fit_one_prefill_step(
    home: Home, given: int | None, expected: int
) -> None:
    if given is not None:
        home.schedule["maxN"] = given
    settings = home.load()
    assert settings.schedule.max_n == expected
    assert any("maxN=128: 50 is used" in note for note in settings.notes) == (given == 128)


def test_prompt_limit_leaves_room_for_a_token(home: Home) -> None:
    home.deploy["maxInputTokenLen"] = 2560
    assert home.load().schedule.max_input_len == 2559


# --- weight of the parent ---


def test_loading_imports_nothing_heavy() -> None:
    script = (
        "import sys, daemon.config\n"
        "heavy = {'torch', 'aiohttp', 'zmq', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
