"""The daemon with deviceType npu: one model instance on each of two simulated devices, asked over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness import Daemon, merge

STARTS_WITHIN_S = 150.0  # each worker imports torch_npu, and so does the process that asks the driver for it


def ask(daemon: Daemon, content: str) -> str:
    body = {
        "model": "mindie-tiny", "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    answer = daemon.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_instances_on_two_devices_answer_as_the_cpu_does(
    stand_in: Any, make_daemon: Callable[..., Daemon]
) -> None:
    runtime = {"BackendConfig": {"runtimeConfig": {"deviceType": "npu"}}}
    two = {"BackendConfig": {"modelInstanceNumber": 2, "npuDeviceIds": [[0], [1]]}}
    npu = make_daemon(merge(runtime, two))
    npu.environ = stand_in.environ({**os.environ, "OMP_NUM_THREADS": "1"})
    npu.start()
    cpu = make_daemon({"BackendConfig": {"runtimeConfig": {"deviceType": "cpu"}}}).start()
    cpu.wait_ready(STARTS_WITHIN_S)
    npu.wait_ready(STARTS_WITHIN_S)
    # each sees the one device that is its own
    assert npu.stderr.count("npu:0, Ascend910B1, torch_npu operators") == 2
    for question in ("Who are you?", "What is 2 + 3?", "Name a colour."):
        assert ask(npu, question) == ask(cpu, question)
    assert npu.stop() == 0, npu.stderr
    assert cpu.stop() == 0, cpu.stderr
