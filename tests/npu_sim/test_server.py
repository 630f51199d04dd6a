"""The daemon with deviceType npu on two simulated devices: an instance on each, or one divided by both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import TINY_MODEL, Daemon, Installation, merge, model_config

STARTS_WITHIN_S = 150.0  # each worker imports torch_npu, and so does the process that asks the driver for it
QUESTIONS = ("Who are you?", "What is 2 + 3?", "Name a colour.")
NPU = {"BackendConfig": {"runtimeConfig": {"deviceType": "npu"}}}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def ask(daemon: Daemon, content: str) -> str:
    body = {
        "model": "mindie-tiny", "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    answer = daemon.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def said_on_cpu(installation: Installation) -> Iterator[list[str]]:
    cpu = installation.daemon({"BackendConfig": {"runtimeConfig": {"deviceType": "cpu"}}})
    cpu.start().wait_ready(STARTS_WITHIN_S)
    yield [ask(cpu, question) for question in QUESTIONS]
    assert cpu.stop() == 0, cpu.stderr


def start(stand_in: Any, npu: Daemon) -> Daemon:
    npu.environ = stand_in.environ({**os.environ, "OMP_NUM_THREADS": "1"})
    return npu.start().wait_ready(STARTS_WITHIN_S)


def test_two_instances_on_two_devices_answer_as_the_cpu_does(
    stand_in: Any, make_daemon: Callable[..., Daemon], said_on_cpu: list[str]
) -> None:
    two = {"BackendConfig": {"modelInstanceNumber": 2, "npuDeviceIds": [[0], [1]]}}
    npu = start(stand_in, make_daemon(merge(NPU, two)))
    # each sees the one device that is its own
    assert npu.stderr.count("npu:0, Ascend910B1, torch_npu operators") == 2
    assert [ask(npu, question) for question in QUESTIONS] == said_on_cpu
    assert npu.stop() == 0, npu.stderr


def test_two_ranks_on_two_devices_answer_as_the_cpu_does(
    stand_in: Any, make_daemon: Callable[..., Daemon], said_on_cpu: list[str]
) -> None:
    """They divide one model, and talk over hccl."""
    model = model_config(modelName="mindie-tiny", modelWeightPath=str(TINY_MODEL), worldSize=2)
    divided = merge(merge(NPU, model), {"BackendConfig": {"npuDeviceIds": [[0, 1]]}})
    npu = start(stand_in, make_daemon(divided))
    assert npu.stderr.count("of 2 has joined over hccl") == 2
    assert [ask(npu, question) for question in QUESTIONS] == said_on_cpu
    assert npu.stop() == 0, npu.stderr
    assert not npu.leftovers()
