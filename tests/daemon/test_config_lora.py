"""LoRA adapters in the configuration, one test for each rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.settings import LoraModule
from tests.daemon.config_home import Home

BASE = "mindie-tiny"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.server["httpsEnabled"] = False
    home.model["modelName"] = BASE
    return home


def put_adapter(home: Home, place: str, **changes: Any) -> Path:
    config = {"r": 8, "lora_alpha": 16, **changes}
    home.put(f"{place}/adapter_config.json", json.dumps(config))
    home.put(f"{place}/adapter_model.safetensors", "weights")
    folder = home.root / place
    folder.chmod(0o750)
    return folder


def module(name: str, path: str | None = None, base: str = BASE) -> dict[str, Any]:
    return {"name": name, "path": path or f"loras/{name}", "baseModelName": base}


def test_nothing_is_configured(home: Home) -> None:
    lora = home.load().model.lora
    assert lora.modules == () and not lora.dynamic
    assert lora.root == home.root


def test_modules_in_their_order_with_relative_and_absolute_paths(home: Home) -> None:
    put_adapter(home, "loras/first.v1")
    elsewhere = put_adapter(home, "elsewhere")
    home.deploy["LoraModules"] = [module("first.v1"), module("second", str(elsewhere))]
    assert home.load().model.lora.modules == (
        LoraModule("first.v1", home.root / "loras/first.v1"),
        LoraModule("second", elsewhere),
    )


def test_quantised_weights_have_no_adapters(home: Home) -> None:
    config = home.model_dir / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantize": "w8a8"}))
    put_adapter(home, "loras/first")
    home.deploy["LoraModules"] = [module("first")]
    findings = home.findings()
    assert any("LoraModules=1: adapters cannot be combined with quantised" in line for line in findings)
    home.deploy.update(LoraModules=[], maxLoras=2, maxLoraRank=8)
    assert any("maxLoras=2: adapters cannot be combined" in line for line in home.findings())


def test_run_time_loading_needs_both_limits(home: Home) -> None:
    home.deploy.update(maxLoras=4, maxLoraRank=64)
    assert home.load().model.lora.dynamic
    home.deploy["maxLoraRank"] = 0
    assert "run time is off" in home.warning("maxLoras=4")
    assert not home.load().model.lora.dynamic
    home.deploy.update(maxLoras=0, maxLoraRank=64)
    assert "run time is off" in home.warning("maxLoraRank=64")


@pytest.mark.parametrize(("variable", "policy"), [(None, "warn"), ("0", "off"), ("1", "refuse")])
def test_the_rule_for_files_is_handed_on(home: Home, variable: str | None, policy: str) -> None:
    home.model_dir.chmod(0o750)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (home.model_dir / name).chmod(0o640)
    if variable is not None:
        home.environ["MINDIE_CHECK_INPUTFILES_PERMISSION"] = variable
    assert home.load().model.lora.file_policy == policy


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"name": None}, "LoraModules[0].name=<absent>", "required key is missing"),
        ({"name": ""}, 'LoraModules[0].name=""', "malformed"),
        ({"name": 7}, "LoraModules[0].name=7", "malformed"),
        ({"name": "a b"}, 'LoraModules[0].name="a b"', "malformed"),
        ({"name": "../a"}, 'LoraModules[0].name="../a"', "malformed"),
        ({"name": "a" * 257}, "LoraModules[0].name=", "malformed"),
        ({"name": "None"}, 'LoraModules[0].name="None"', "stands for the base model"),
        ({"name": BASE}, f'LoraModules[0].name="{BASE}"', f'ModelConfig[0].modelName="{BASE}"'),
        ({"path": None}, "LoraModules[0].path=<absent>", "required key is missing"),
        ({"path": ""}, 'LoraModules[0].path=""', "not a path"),
        ({"path": "a\0b"}, "LoraModules[0].path=", "not a path"),
        ({"path": ["a"]}, 'LoraModules[0].path=["a"]', "not a path"),
        ({"path": "gone"}, 'LoraModules[0].path="gone"', "no such directory"),
        ({"baseModelName": None}, "LoraModules[0].baseModelName=<absent>", "required key is missing"),
        ({"baseModelName": "llama"}, 'LoraModules[0].baseModelName="llama"', f'allowed: "{BASE}"'),
    ],
)  # fmt: skip
def test_one_wrong_value_is_one_finding(home: Home, changes: dict[str, Any], key: str, part: str) -> None:
    put_adapter(home, "loras/a")
    entry = {**module("a"), **changes}
    home.deploy["LoraModules"] = [{name: value for name, value in entry.items() if value is not None}]
    finding = home.only_finding()
    assert finding.startswith(f"[config] BackendConfig.ModelDeployConfig.{key}") and part in finding
    assert "; allowed: " in finding


@pytest.mark.parametrize("value", ["a", [7], {"name": "a"}])
def test_not_a_list_of_objects(home: Home, value: Any) -> None:
    home.deploy["LoraModules"] = value
    assert "LoraModules=" in home.only_finding()


def test_all_findings_come_at_once(home: Home) -> None:
    home.deploy["LoraModules"] = [{"name": "a b", "path": ""}, module("gone"), {**module("x"), "name": BASE}]
    keys = [finding.partition("=")[0].rpartition("LoraModules")[2] for finding in home.findings()]
    assert keys == ["[0].name", "[0].path", "[0].baseModelName", "[2].name", "[1].path"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_is_missing(home: Home, name: str) -> None:
    (put_adapter(home, "loras/a") / name).unlink()
    home.deploy["LoraModules"] = [module("a")]
    assert f"no such file: {home.root}/loras/a/{name}" in home.only_finding()


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"lora_alpha": 16}', 'no positive integer "r"'),
        ('{"r": 0, "lora_alpha": 16}', 'no positive integer "r"'),
        ('{"r": true, "lora_alpha": 16}', 'no positive integer "r"'),
        ('{"r": 8}', 'no number "lora_alpha"'),
        ('{"r": 65, "lora_alpha": 16}', "rank 65; allowed: ranks up to 64; see BackendConfig."),
    ],
)
def test_adapter_config(home: Home, config: str, part: str) -> None:
    folder = put_adapter(home, "loras/a")
    (folder / "adapter_config.json").write_text(config)
    home.deploy.update(LoraModules=[module("a")], maxLoras=4, maxLoraRank=64)
    assert part in home.only_finding()


def test_more_adapters_than_max_loras(home: Home) -> None:
    for name in ("a", "b"):
        put_adapter(home, f"loras/{name}")
    home.deploy.update(LoraModules=[module("a"), module("b")], maxLoras=1, maxLoraRank=64)
    assert "maxLoras=1: 2 adapters are configured" in home.only_finding()
    home.deploy["maxLoras"] = 2
    assert len(home.load().model.lora.modules) == 2


def test_a_name_given_twice_keeps_the_first_path(home: Home) -> None:
    first, _ = put_adapter(home, "loras/a"), put_adapter(home, "loras/b")
    home.deploy["LoraModules"] = [module("a"), module("a", "loras/b")]
    assert home.warning("LoraModules[1].name=a").endswith("path=loras/a is used")
    assert home.load().model.lora.modules == (LoraModule("a", first),)


def test_unknown_members_are_remarked_upon(home: Home) -> None:
    put_adapter(home, "loras/a")
    home.deploy["LoraModules"] = [{**module("a"), "rank": 8}]
    assert "LoraModules[0].rank" in home.warning("unknown keys")


def test_modes_and_owner_as_for_weights(home: Home) -> None:
    folder = put_adapter(home, "loras/a")
    folder.chmod(0o777)
    home.deploy["LoraModules"] = [module("a")]
    assert "mode 0777 is wider than 0750" in home.warning("LoraModules[0].path")
    home.environ["MINDIE_CHECK_INPUTFILES_PERMISSION"] = "1"
    assert any("LoraModules[0].path" in finding and "chmod" in finding for finding in home.findings())


@pytest.mark.parametrize("plugin", ["prefix_cache", "splitfuse"])
@pytest.mark.parametrize("static", [True, False])
def test_what_adapters_cannot_be_combined_with(home: Home, plugin: str, static: bool) -> None:
    put_adapter(home, "loras/a")
    home.model["plugin_params"] = json.dumps({"plugin_type": plugin})
    home.schedule["templateType"] = "Mix" if plugin == "splitfuse" else "Standard"
    home.load()
    home.deploy.update({"LoraModules": [module("a")]} if static else {"maxLoras": 1, "maxLoraRank": 8})
    assert f'plugin_params="{plugin}": cannot be combined with LoRA adapters' in home.only_finding()


def test_a_mock_has_nothing_to_adapt(home: Home) -> None:
    put_adapter(home, "loras/a")
    home.model["modelInstanceType"] = "StandardMock"
    home.deploy["LoraModules"] = [module("a")]
    assert 'modelInstanceType="StandardMock": has no weights to adapt' in home.only_finding()


# --- lora_adapter.json ---


def test_the_older_file_is_read_with_a_warning(home: Home) -> None:
    inside, outside = put_adapter(home, "models/mindie-tiny/a"), put_adapter(home, "loras/b")
    home.put("models/mindie-tiny/lora_adapter.json", json.dumps({"a": "a", "b": str(outside)}))
    assert "LoraModules" in home.warning("lora_adapter.json: deprecated")
    assert home.load().model.lora.modules == (LoraModule("a", inside), LoraModule("b", outside))


def test_lora_modules_win_over_the_older_file(home: Home) -> None:
    folder = put_adapter(home, "loras/a")
    home.put("models/mindie-tiny/lora_adapter.json", "{broken")
    home.deploy["LoraModules"] = [module("a")]
    assert "is set" in home.warning("lora_adapter.json: ignored")
    assert home.load().model.lora.modules == (LoraModule("a", folder),)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"a b": "x"}', "malformed"),
        ('{"a": 7}', "lora_adapter.json.a=7: not a path"),
        ('{"a": "gone"}', 'lora_adapter.json.a="gone": no such directory'),
    ],
)
def test_the_older_file_is_checked_as_well(home: Home, text: str, part: str) -> None:
    home.put("models/mindie-tiny/lora_adapter.json", text)
    assert part in home.only_finding()
