"""Each level of README.md in a process of its own: torch_npu cannot be taken back out of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

RunLevel = Callable[..., None]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_level_2_the_runtime(run_level: RunLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,0")
    run_level("level2_runtime.py", arithmetic=False, devices=3, memory_mib=512)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_level_3_the_runtime(run_level: RunLevel) -> None:
    run_level("level3_runtime.py")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_level_2_traced(run_level: RunLevel) -> None:
    run_level("level2_traced.py", arithmetic=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_level_2_the_model(run_level: RunLevel) -> None:
    run_level("level2_model.py", arithmetic=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_level_3_the_model(run_level: RunLevel) -> None:
    run_level("level3_model.py")
