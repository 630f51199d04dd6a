"""Whole models on the device: against the CPU, and graphs against steps without. See README.md."""

from __future__ import annotations

import pytest

from tests import hardware
from worker.attention.npu import BLOCK_SIZE
from worker.platforms.npu import GRAPHS, NpuPlatform

pytestmark = pytest.mark.timeout(600)


def test_greedy_tokens_equal_the_cpus(platform: NpuPlatform) -> None:
    del platform
    hardware.check_greedy(hardware.generate("npu", BLOCK_SIZE)[0], hardware.generate("cpu", BLOCK_SIZE)[0])


def test_graphs_give_what_steps_without_give(
    platform: NpuPlatform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    del platform
    hardware.check_graphs("npu", BLOCK_SIZE, GRAPHS, monkeypatch, caplog)


def test_memory_is_told_runs_out_and_comes_back(platform: NpuPlatform) -> None:
    hardware.check_memory(platform)
