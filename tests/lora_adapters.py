"""Random LoRA adapters, and the reference for what they do: a transformers model with them merged in."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "write_random_lora.py"


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("write_random_lora", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _load_script()
write_adapter: Callable[..., int] = script.write_adapter


def edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / script.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def merged(model: Any, adapter: Path) -> Any:
    """A copy of a transformers model with W + scaling * B A for every W the adapter names."""
    config = json.loads((adapter / script.CONFIG_FILE).read_text())
    tensors = load_file(adapter / script.WEIGHTS_FILE)
    result = copy.deepcopy(model)
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        alpha = next(
            (v for k, v in config.get("alpha_pattern", {}).items() if module.endswith(k)),
            config["lora_alpha"],
        )
        rank = len(a)
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        weight = result.get_submodule(module).weight
        weight += (scaling * (b.float() @ a.float())).to(weight.dtype)
    return result
