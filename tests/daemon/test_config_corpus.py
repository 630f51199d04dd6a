"""Files as they are found in the field: corpus/ holds them, this table what each must lead to.

They are read unchanged. Where the only thing missing is the model, the same file starts with one
(tests/reliability/test_config.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from daemon.config_check import check_config
from daemon.config_report import ConfigError
from tests.daemon.config_home import Home

CORPUS = Path(__file__).parent / "corpus"
SERVER, BACKEND = "ServerConfig", "BackendConfig"
DEPLOY, SCHEDULE = "BackendConfig.ModelDeployConfig", "BackendConfig.ScheduleConfig"
MODEL = f"{DEPLOY}.ModelConfig[0]"

_NO_MODEL = {f"{MODEL}.modelWeightPath": "no such directory"}  # of the machine the file comes from
_NO_CERTIFICATES = {
    f"{SERVER}.{plane}{key}": "no such file"
    for plane in ("tls", "managementTls", "metricsTls")
    for key in ("CaFile[0]", "Cert", "Pk", "PkPwd", "CrlFiles[0]")
}
_STOCK_WARNING = "interCommTLSEnabled"  # of the keys that never have an effect here


class Case(NamedTuple):
    """Findings: path -> part of the line. Warnings: parts that must be found in one each."""

    findings: dict[str, str]
    warnings: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    # --- versions ---
    "v1_0_rc1.json": Case(
        {
            "ServerConfig": "required key is missing",
            "BackendConfig": "required key is missing",
            "OtherParam": "allowed: ServerConfig, LogConfig and BackendConfig.ScheduleConfig.cacheBlockSize",
            "WorkFlowParam": "allowed: BackendConfig.ScheduleConfig.templateType",
            "ModelDeployParam": "allowed: BackendConfig and BackendConfig.ModelDeployConfig",
            "ScheduleParam": "allowed: BackendConfig.ScheduleConfig",
        },
        ("Version=null",),
    ),
    "v1_0_rc2_half_migrated.json": Case(
        {
            f"{BACKEND}.backendName": "the file has engineName, its name in older versions",
            f"{BACKEND}.modelInstanceNumber": "the file has pipelineNumber, its name in older versions",
            f"{DEPLOY}.ModelConfig": "the file has ModelParam, its name in older versions",
            SCHEDULE: "required key is missing",
            f"{BACKEND}.ScheduleParam": "older file layout",
        },
        (
            "ServerConfig.tlsCrl (now tlsCrlPath and tlsCrlFiles)",
            "ServerConfig.multiNodesInferPort (belongs to BackendConfig)",
            "LogConfig.logLevel (now MINDIE_LOG_LEVEL in the environment)",
        ),
    ),
    "v1_0_0_http.json": Case(
        _NO_MODEL, ("LogConfig.{logFileSize, logFileNum} (now MINDIE_LOG_ROTATE", "httpsEnabled=false")
    ),
    "v1_0_splitfuse.json": Case(_NO_MODEL, ("enableSplit, splitType, splitStartType",)),
    "v2_0_stock.json": Case({**_NO_MODEL, **_NO_CERTIFICATES}, ("kv_trans_timeout",)),
    "v2_1_one_device.json": Case(_NO_MODEL, (_STOCK_WARNING,)),
    "v2_1_deepseek_two_nodes.json": Case(
        {**_NO_MODEL, f"{BACKEND}.multiNodesInferEnabled": "not supported by this build"},
        ("models.deepseekv2.kv_cache_options: options of NPU kernels",),
    ),
    "v2_1_prefix_cache.json": Case(_NO_MODEL, ("enablePrefixCache (now plugin_params)",)),
    "v2_1_splitfuse_without_mix.json": Case(
        {
            **_NO_MODEL,
            f"{SCHEDULE}.templateType": "splitfuse in plugin_params needs templateType Mix",
            f"{SCHEDULE}.dynamicBatchSizeEnable": "cannot be combined with splitfuse",
        }
    ),
    "v2_1_lookahead.json": Case(_NO_MODEL),
    "v2_2_dmi.json": Case(
        {
            **_NO_MODEL,
            f"{SERVER}.inferMode": 'not supported by this build; allowed: "standard"',
            f"{SERVER}.distDPServerEnabled": "not supported by this build; allowed: false",
        }
    ),
    "v2_2_mtp_quantised.json": Case({**_NO_MODEL, f"{MODEL}.plugin_params": "plugin mtp is not supported"}),
    "v2_3_kv_pool.json": Case(
        {**_NO_MODEL, f"{BACKEND}.kvPoolConfig.backend": "not supported by this build"}
    ),
    "v2_3_lora_fragment.json": Case(
        {
            **_NO_MODEL,
            f"{SERVER}.allowAllZeroIpListening": "required key is missing",
            f"{SERVER}.maxLinkNum": "allowed: [1, 4096]",
            f"{SERVER}.inferMode": 'allowed: "standard", "dmi"',
            f"{SERVER}.httpsEnabled": "allowed: true or false",
            SCHEDULE: "required key is missing",
            f"{DEPLOY}.LoraModules[0].baseModelName": 'allowed: "llama3.1-70b"',
        },
        ("interNodeTlsCrlfiles (did you mean interNodeTlsCrlFiles?)",),
    ),
    # --- mistakes ---
    "comment.json": Case({"config.json": "line 99 column 39 (char 3636); comments are not allowed"}),
    "trailing_comma.json": Case({"config.json": "a comma before the closing bracket is not allowed"}),
    "comma_inside_the_quotes.json": Case(
        {"config.json": "a comma missing before it, or inside of the quotes?"}
    ),
    "typographic_quotes.json": Case({"config.json": 'typographic quotes, use "'}),
    "duplicate_keys.json": Case(
        {
            f"{SERVER}.httpsEnabled": "key given more than once",
            f"{DEPLOY}.maxSeqLen": "key given more than once",
        }
    ),
    "windows_editor.json": Case(_NO_MODEL, (_STOCK_WARNING,)),
    "quoted_numbers.json": Case(
        {
            **_NO_MODEL,
            f"{SERVER}.port": "did you mean 1025?",
            f"{SERVER}.maxLinkNum": "did you mean 300?",
            f"{SERVER}.fullTextEnabled": "did you mean false?",
            f"{SERVER}.httpsEnabled": "did you mean false?",
            f"{BACKEND}.npuDeviceIds": "did you mean [[0]]?",
            f"{MODEL}.worldSize": "did you mean 1?",
            f"{MODEL}.cpuMemSize": "out of range",
            f"{MODEL}.backendType": 'did you mean "atb"?',
            f"{SCHEDULE}.templateType": 'did you mean "Standard"?',
        }
    ),
    "misspelled.json": Case(
        {
            **_NO_MODEL,
            f"{MODEL}.npuMemSize": "is npuMemsize a misspelling of it?",
            f"{SCHEDULE}.maxPrefillTokens": "is maxPrefilTokens a misspelling of it?",
            f"{SCHEDULE}.maxIterTimes": "is maxIterTime a misspelling of it?",
        },
        (
            "ServerConfig.openAISupport (did you mean openAiSupport?)",
            "ServerConfig.maxSeqLen (belongs to BackendConfig.ModelDeployConfig)",
        ),
    ),
    "schedule_in_the_wrong_section.json": Case(
        {
            **_NO_MODEL,
            SCHEDULE: "the file has it at BackendConfig.ModelDeployConfig.ScheduleConfig: move it",
        },
        ("BackendConfig.ModelDeployConfig.ScheduleConfig (belongs to BackendConfig)",),
    ),
    "tuned_by_a_script.json": Case(
        {
            **_NO_MODEL,
            f"{SCHEDULE}.decodePolicyType": "allowed: 0 (first come, first served)",
            f"{SCHEDULE}.maxQueueDelayMicroseconds": "allowed: [500, 1000000]",
            f"{SCHEDULE}.maxPreemptCount": f"larger than {SCHEDULE}.maxBatchSize=650",
        },
        ("trustRemoteCode=true: security",),
    ),
    "long_texts.json": Case(
        {
            **_NO_MODEL,
            f"{SCHEDULE}.maxPrefillTokens": f"smaller than {DEPLOY}.maxInputTokenLen=30000",
            f"{SCHEDULE}.maxIterTimes": f"larger than {DEPLOY}.maxSeqLen=32768",
        }
    ),
    "two_instances.json": Case(_NO_MODEL),
    "two_instances_on_one_device.json": Case(
        {**_NO_MODEL, f"{BACKEND}.npuDeviceIds[1]": "already belong to an earlier model instance"}
    ),
    "all_zero_in_a_container.json": Case(
        {
            **_NO_MODEL,
            f"{SERVER}.ipAddress": f"see {SERVER}.allowAllZeroIpListening=false",
            f"{SERVER}.managementIpAddress": f"see {SERVER}.allowAllZeroIpListening=false",
            f"{SERVER}.metricsPort": "same as the business port",
        }
    ),
}


def test_every_file_of_the_corpus_has_a_row() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_P15_F31_unchanged_files_say_exactly_what_is_wrong(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path)
    home.put("conf/config.json", mode=0o640)
    home.file.write_bytes((CORPUS / name).read_bytes())
    with pytest.raises(ConfigError) as caught:
        home.load_file()
    lines = {
        finding.removeprefix("[config] ").partition("=")[0]: finding for finding in caught.value.findings
    }
    assert set(lines) == set(CASES[name].findings)
    assert len(lines) == len(caught.value.findings)
    for path, part in CASES[name].findings.items():
        assert part in lines[path], lines[path]
    for part in CASES[name].warnings:
        found = [warning for warning in caught.value.warnings if part in warning]
        assert len(found) == 1, (part, caught.value.warnings)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.findings == _NO_MODEL])
def test_P15_files_that_lack_only_the_model_are_valid_with_one(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unchanged but for where the model lies."""
    home = Home(tmp_path)
    text = (CORPUS / name).read_text(encoding="utf-8-sig")
    text = text.replace("/home/models/Qwen2.5-0.5B-Instruct", "models/mindie-tiny")
    home.put("conf/config.json", text, 0o640)
    home.use_real_model()
    assert check_config(None, {}, home.root / "bin" / "mindieservice_daemon") == 0
    assert "valid, 0 errors" in capsys.readouterr().out
