"""The chat switches in the `models` object, and the kernel options beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.settings import ChatSettings
from tests.daemon.config_home import Home

KERNELS = {
    "kv_cache_options": {"enable_nz": True},
    "ep_level": 1,
    "parallel_options": {"lm_head_local_tp": -1, "o_proj_local_tp": -1},
}
ARCH = "BackendConfig.ModelDeployConfig.ModelConfig[0].models"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.server["httpsEnabled"] = False
    return home


def settings(home: Home, models: Any) -> ChatSettings:
    home.model["models"] = models
    return home.load().model.chat


def test_without_switches_the_model_decides(home: Home) -> None:
    home.model.pop("models", None)
    assert home.load().model.chat == ChatSettings(reasoning=False, tool_call_parser="", template=None)
    empties: list[Any] = [
        {}, {"qwen3": {}}, {"qwen3": {"enable_reasoning": None, "tool_call_options": None}},
        {"qwen3": {"tool_call_options": {}}}, {"deepseekv2": KERNELS},
    ]  # fmt: skip
    for models in empties:
        assert settings(home, models) == ChatSettings()


def test_every_switch(home: Home) -> None:
    template = home.put("chat/own.jinja", "{{ messages }}")
    assert settings(
        home,
        {
            "qwen3": {
                "enable_reasoning": True,
                "tool_call_options": {"tool_call_parser": "llama3_json"},
                "chat_template": "chat/own.jinja",
                **KERNELS,
            }
        },
    ) == ChatSettings(reasoning=True, tool_call_parser="llama3_json", template=template)
    assert settings(home, {"x": {"tool_call_parser": "qwen3"}}).tool_call_parser == "qwen3"
    assert settings(home, {"x": {"chat_template": str(template)}}).template == template


def test_kernel_options_are_named_once(home: Home) -> None:
    home.model["models"] = {
        "deepseekv2": {**KERNELS, "enable_reasoning": True},
        "layerwiseDisaggregatedMasterDeviceNum": 1,
    }
    warning = home.warning("options of NPU kernels, ignored")
    assert "deepseekv2.ep_level" in warning and "MasterDeviceNum" in warning
    assert "enable_reasoning" not in warning


def test_architectures_must_agree(home: Home) -> None:
    both = {"a": {"enable_reasoning": True}, "b": {"enable_reasoning": True}}
    assert settings(home, both).reasoning
    home.model["models"] = {"a": {"enable_reasoning": True}, "b": {"enable_reasoning": False}}
    finding = home.only_finding()
    assert finding.startswith(f"[config] {ARCH}.b.enable_reasoning=false: differs from {ARCH}.a.")


@pytest.mark.parametrize(
    ("options", "where", "said"),
    [
        ({"enable_reasoning": 1}, "enable_reasoning=1", "must be true or false"),
        ({"enable_reasoning": "true"}, 'enable_reasoning="true"', "must be true or false"),
        ({"tool_call_parser": "hermess"}, 'tool_call_parser="hermess"', "did you mean hermes?"),
        ({"tool_call_parser": 3}, "tool_call_parser=3", "must be a string"),
        ({"tool_call_options": []}, "tool_call_options=[]", "must be an object"),
        ({"tool_call_options": {"tool_call_parser": "x"}}, "tool_call_options.tool_call_parser", '"hermes"'),
        ({"chat_template": ""}, 'chat_template=""', "must be a path"),
        ({"chat_template": 1}, "chat_template=1", "must be a path"),
        ({"chat_template": "chat.txt"}, 'chat_template="chat.txt"', "does not end with .jinja"),
        ({"chat_template": "none.jinja"}, 'chat_template="none.jinja"', "no such file"),
    ],
)
def test_what_cannot_be_used_is_one_finding(
    home: Home, options: dict[str, Any], where: str, said: str
) -> None:
    home.model["models"] = {"qwen3": options}
    finding = home.only_finding()
    assert f"{ARCH}.qwen3.{where}" in finding and said in finding and "allowed:" in finding
