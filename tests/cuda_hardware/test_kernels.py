"""Each kernel against its twin out of torch operators on the CPU. See README.md."""

from __future__ import annotations

import pytest
import torch

from engine.plan import StepKind
from tests import hardware
from worker.attention.base import AttentionSpec
from worker.attention.registry import make_attention
from worker.platforms.base import Platform

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 128])
@hardware.HEADS
@pytest.mark.parametrize("window", [None, 100])
@hardware.STEP_KINDS
def test_attention_equals_the_reference(
    platform: Platform,
    kind: StepKind,
    rows: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
) -> None:
    spec = AttentionSpec(*heads, dtype, window=window)
    plan = hardware.plan_of(kind, rows, block_size)
    hardware.check_attention(
        lambda spec: make_attention("triton", spec), platform.device, spec, plan, block_size
    )


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_row_operations_equal_their_twins(platform: Platform, rows: int, head_dim: int) -> None:
    hardware.check_row_ops(platform.row_ops, platform.device, rows, head_dim)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["w8a8", "w8a8_dynamic", "w8a16"])
def test_quantised_layers_equal_the_cpus(
    platform: Platform, kind: str, dtype: torch.dtype, rows: int
) -> None:
    hardware.check_quantised(platform, kind, dtype, rows)
