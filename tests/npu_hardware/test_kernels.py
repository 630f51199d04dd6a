"""Each operator against its twin out of torch operators on the CPU. See README.md."""

from __future__ import annotations

import pytest
import torch

from engine.plan import StepKind
from tests import hardware
from worker.attention.base import AttentionSpec
from worker.attention.npu import BLOCK_SIZE, NpuAttention
from worker.platforms.npu import NpuPlatform
from worker.platforms.npu_row_ops import NpuRowOps

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@hardware.HEADS
@pytest.mark.parametrize("window", [None, 100])
@hardware.STEP_KINDS
def test_attention_equals_the_reference(
    platform: NpuPlatform,
    kind: StepKind,
    rows: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    spec = AttentionSpec(*heads, dtype, window=window)
    plan = hardware.plan_of(kind, rows, BLOCK_SIZE)
    hardware.check_attention(NpuAttention, platform.device, spec, plan, BLOCK_SIZE)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_row_operations_equal_their_twins(platform: NpuPlatform, rows: int, head_dim: int) -> None:
    hardware.check_row_ops(NpuRowOps(), platform.device, rows, head_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["w8a8", "w8a8_dynamic", "w8a16"])
def test_quantised_layers_equal_the_cpus(platform: NpuPlatform, kind: str, dtype: torch.dtype) -> None:
    hardware.check_quantised(platform, kind, dtype, rows=33)
