"""The program that test_trace.py starts: traces checkpoints on the pretended device, prints what came of it.

    python -m tests.npu_schemas.trace DTYPE:NAME=FOLDER...

Prints one JSON object: for each DTYPE:NAME and each kind of step the launches by operator, and what the step
gave; under "calls" what is said of each of CALLS, "" where it is a right one.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import worker.models.weight_reader
import worker.runner
from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.npu_schemas.pretend_npu import Launches, install
from tests.worker.conftest import MODEL, SCHEDULE
from worker.loader import Checkpoint
from worker.platforms.memory_limits import MemoryInfo
from worker.platforms.npu import NpuPlatform
from worker.runner import ModelRunner

BLOCK_SIZE = 128
NUM_BLOCKS = 32


class PretendedNpu(NpuPlatform):
    """The platform without what asks the driver."""

    def set_up(self, device_id: int, num_workers: int, threads: int) -> None:
        self._device = torch.device("npu", 0)
        self._chip = "Ascend910B1"

    def memory(self) -> MemoryInfo:
        return MemoryInfo(2**30, 2**30)

    def give_back_memory(self) -> None:
        pass

    def step_graphs(self, max_rows: int, max_seq_len: int, block_size: int) -> None:
        """What a graph holds are the same calls."""


class WithoutDevice(FakeTensorMode):
    """Computes nothing ahead, though it knows the numbers: there is no device to do it."""

    @property
    def avoid_device_init(self) -> bool:
        return True


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """With real tensors: reading a checkpoint looks at numbers."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return wrapper


def read_untraced() -> None:
    for name in ("take", "raw"):
        setattr(Checkpoint, name, untraced(getattr(Checkpoint, name)))
    for name in ("mergeable", "take_quantised", "norm_tensors"):
        setattr(worker.models.weight_reader, name, untraced(getattr(worker.models.weight_reader, name)))


def steps() -> dict[str, StepPlan]:
    def plan(kind: StepKind, *rows: tuple[int, int]) -> StepPlan:
        """rows: (tokens cached, tokens new) each."""
        blocks = list(range(NUM_BLOCKS))
        sequences = []
        for cached, new in rows:
            sequence = Sequence(0, np.zeros(cached + new, np.int32), SamplingParams(max_tokens=1))
            sequence.num_computed = cached
            sequence.block_table = [blocks.pop() for _ in range(-(-(cached + new) // BLOCK_SIZE))]
            sequences.append(sequence)
        return build_plan(kind, sequences, BLOCK_SIZE)

    return {
        "prefill": plan(StepKind.PREFILL, (0, 150), (0, 7)),
        "chunk": plan(StepKind.PREFILL, (130, 60), (128, 1), (0, 9)),
        "decode one": plan(StepKind.DECODE, (200, 1)),
        "decode": plan(StepKind.DECODE, (200, 1), (3, 1), (127, 1)),
    }


CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "right": lambda x: torch.ops.npu.npu_rms_norm(x, x[0], epsilon=1e-6),
    "wrong keyword": lambda x: torch.ops.npu.npu_rms_norm(x, x[0], eps=1e-6),
    "missing argument": lambda x: torch.ops.npu.npu_rms_norm(x),
    "by place, not by keyword": lambda x: torch.ops.npu.npu_dynamic_quant(x, None),
    "unknown operator": lambda x: torch.ops.npu.npu_rms_norms(x, x[0]),
    "other device": lambda x: torch.ops.npu.npu_rms_norm(x, torch.empty(64, dtype=x.dtype)),
    "other shape": lambda x: torch.ops.npu.npu_rms_norm(x, x[0, :32]),
}


def called(call: Callable[[torch.Tensor], Any]) -> str:
    with WithoutDevice():
        try:
            call(torch.empty(3, 64, device="npu", dtype=torch.bfloat16))
        except (RuntimeError, ValueError, AttributeError) as error:
            return str(error)
    return ""


def traced(folder: Path, dtype: str) -> dict[str, Any]:
    """Every kind of step of one checkpoint."""
    schedule = replace(SCHEDULE, block_size=BLOCK_SIZE, max_seq_len=512, max_input_len=511)
    settings = replace(MODEL, weight_path=folder, device_type="npu", dtype=dtype)
    runner = ModelRunner(settings, schedule, 0, lambda phase, fraction: None)
    runner.load()
    runner.allocate(NUM_BLOCKS)
    told = {}
    for name, plan in steps().items():
        with Launches() as launches:
            logits = runner.forward(plan)
        told[name] = {
            "launches": launches.counts,
            "logits": list(logits.shape),
            "dtype": str(logits.dtype),
            "device": str(logits.device),
        }
    return told


def main(arguments: list[str]) -> None:
    install()
    read_untraced()
    worker.runner.select_platform = lambda device_type: PretendedNpu()
    told: dict[str, Any] = {"calls": {name: called(call) for name, call in CALLS.items()}}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        # weights are mapped files: they enter the trace as they are met
        with WithoutDevice(allow_non_fake_inputs=True):
            told[name] = traced(Path(folder), name.partition(":")[0])
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
