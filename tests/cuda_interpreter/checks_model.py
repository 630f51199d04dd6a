"""Whole decoders out of the kernels, against the same checkpoints on the CPU platform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.cuda_interpreter.interpreter  # noqa: F401
from engine.plan import StepKind
from tests.worker.conftest import BLOCK_SIZE, Harness, write_checkpoint
from worker import runner
from worker.attention.base import AttentionSpec
from worker.layers.linear import PlainLinear
from worker.layers.row_ops import RowOps
from worker.platforms.base import Linear
from worker.platforms.cpu import CpuPlatform
from worker.platforms.cuda_row_ops import CudaRowOps


class Interpreted(CpuPlatform):
    """The CPU with the kernels of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.row_ops: RowOps = CudaRowOps()

    def attention_backend(self, spec: AttentionSpec) -> str:
        return "triton"

    invariant_attention_backend = attention_backend

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, may_round: bool = False) -> Linear:
        return PlainLinear(weight, bias)


@pytest.mark.parametrize("name", ["qwen2-tied", "mistral-window"])
def test_logits_of_prompts_pieces_and_decoding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, name, torch.float32)
    wanted = _steps(Harness(tmp_path))
    monkeypatch.setattr(runner, "select_platform", lambda device_type: Interpreted())
    harness = Harness(tmp_path)
    got = _steps(harness)
    backend: Any = harness.runner._attention
    assert type(backend).__name__ == "TritonAttention"
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def _steps(harness: Harness) -> list[Tensor]:
    """Logits of two prompts, of a piece beside a row that decodes, and of decoding."""
    chunked = harness.sequence(list(range(3, 3 + BLOCK_SIZE + 1)))
    other = harness.sequence(list(range(40, 43)))
    steps = [harness.forward(StepKind.PREFILL, [chunked, other]).clone()]
    for token in range(50, 56):
        chunked.append(token)
    other.append(9)
    steps.append(harness.forward(StepKind.PREFILL, [chunked, other]).clone())
    for token in (7, 8):
        chunked.append(token)
        other.append(token)
        steps.append(harness.forward(StepKind.DECODE, [chunked, other]).clone())
    return steps
