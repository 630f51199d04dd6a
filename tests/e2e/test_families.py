"""A daemon for models of other families: greedy answers equal those of transformers, token for token."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.write_random_model import FAMILIES, SHAPES, write_model
from tests.harness import Daemon, Json, sse_payloads

MakeDaemon = Callable[..., Daemon]
GRANITE: Json = {
    "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_multiplier": 0.3,
    "logits_scaling": 2.0, "residual_multiplier": 1.0, "embedding_multiplier": 1.0,
}  # fmt: skip
CONFIG: Json = {
    "BackendConfig": {
        "ModelDeployConfig": {"maxSeqLen": 256, "maxInputTokenLen": 200},
        "ScheduleConfig": {"cacheBlockSize": 16, "maxPrefillTokens": 512, "maxIterTimes": 40},
        "runtimeConfig": {"dtype": "float32", "kvCacheBlockNum": 64},
    }
}
NEW_TOKENS = 12


def generate(daemon: Daemon, ids: list[int]) -> list[int]:
    parameters = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    body = {"input_id": ids, "stream": True, "parameters": parameters}
    with daemon.streaming("/infer_token", body) as response:
        raw = response.read()
        assert response.status == 200, raw
    return [token for payload in sse_payloads(raw) for token in json.loads(payload)["token"]["id"]]


def write(folder: Path, shape: str) -> Any:
    """The checkpoint, Granite as a Llama whose config.json says so; transformers' model of it."""
    write_model(SHAPES["llama-tiny" if shape == "granite" else shape], folder, dtype="float32")
    if shape == "granite":
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | GRANITE))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["deepseek-v3-tiny", "granite"])
def test_the_server_answers_as_transformers_does(make_daemon: MakeDaemon, tmp_path: Path, shape: str) -> None:
    folder = tmp_path / shape
    model = write(folder, shape)
    rng = np.random.default_rng(len(shape))
    prompts = [rng.integers(300, 2048, length).tolist() for length in (1, 17, 90, 190)]
    expected = []
    for ids in prompts:
        with torch.inference_mode():
            whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(whole[0, len(ids) :].tolist())
    daemon = make_daemon(CONFIG, model=folder).start().wait_ready()
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda ids: generate(daemon, ids), prompts)) == expected
    assert ("through transformers' own modules" in daemon.stderr + daemon.stdout) == (shape == "granite")
    assert daemon.stop() == 0


def test_every_family_of_the_script_has_a_shape() -> None:
    assert {shape.family for shape in SHAPES.values()} == set(FAMILIES)
