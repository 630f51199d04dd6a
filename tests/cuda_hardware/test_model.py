"""Whole models on the GPU: against transformers, and graphs against steps without. See README.md."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import hardware
from worker.platforms.base import Platform

BLOCK_SIZE = 16

pytestmark = pytest.mark.timeout(600)


def test_greedy_tokens_equal_those_of_transformers(platform: Platform) -> None:
    model = AutoModelForCausalLM.from_pretrained(hardware.TINY, dtype=torch.bfloat16).to(platform.device)
    want = []
    with torch.inference_mode():
        for prompt in hardware.PROMPTS:
            ids = list(prompt)
            for _ in range(hardware.STEPS):
                logits = model(torch.tensor([ids], device=platform.device)).logits[0, -1]
                ids.append(int(logits.argmax()))
            want.append(ids[len(prompt) :])
    hardware.check_greedy(hardware.generate("cuda", BLOCK_SIZE)[0], want)


def test_graphs_give_what_steps_without_give(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    del platform
    variable = importlib.import_module("worker.platforms.cuda").GRAPHS
    hardware.check_graphs("cuda", BLOCK_SIZE, variable, monkeypatch, caplog)


def test_memory_is_told_runs_out_and_comes_back(platform: Platform) -> None:
    hardware.check_memory(platform)
