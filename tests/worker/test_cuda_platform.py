"""The CUDA platform with a stand-in for torch.cuda: what it claims, tells, refuses and captures.

What its kernels compute is shown in tests/cuda_interpreter and, on a device, in tests/cuda_hardware.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.attention.base import AttentionSpec
from worker.batch import Batch

pytest.importorskip("triton", reason="the platform's modules import it")
from worker.attention.triton_paged import TritonAttention
from worker.platforms import cuda, cuda_graph
from worker.platforms.cuda import GRAPHS, CudaPlatform
from worker.platforms.cuda_graph import CudaDecodeGraphs

GIB = 2**30
BLOCK_SIZE = 16


class FakeCuda:
    """torch.cuda as far as it is asked; a graph is recorded by its second run and replayed by none."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.device: int | None = None

    def set_device(self, device: int) -> None:
        self.device = device

    def mem_get_info(self) -> tuple[int, int]:
        return 50 * GIB, 100 * GIB

    def memory_reserved(self) -> int:
        return 30 * GIB

    def memory_allocated(self) -> int:
        return 20 * GIB

    def graph_pool_handle(self) -> str:
        return "pool"

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def Event(self) -> FakeEvent:
        return FakeEvent(self.calls)

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self.calls)

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert pool == "pool" and capture_error_mode == "thread_local"
        self.calls.append("begin")
        yield
        self.calls.append("end")


class FakeEvent:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def synchronize(self) -> None:
        self._calls.append("wait")

    def record(self) -> None:
        self._calls.append("copied")


class FakeGraph:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def replay(self) -> None:
        self._calls.append("replay")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(cuda, "find_gpu", lambda device_id: ("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(cuda_graph, "pinned", lambda numbers: torch.zeros(numbers, dtype=torch.int32))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return fake


@pytest.fixture
def platform(runtime: FakeCuda) -> CudaPlatform:
    platform = CudaPlatform()
    platform.set_up(device_id=1, num_workers=2, threads=0)
    return platform


def test_one_device_is_claimed_and_described(platform: CudaPlatform, runtime: FakeCuda) -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert (platform.device, runtime.device) == (torch.device("cuda", 0), 0)
    assert platform.describe().startswith("cuda:0, NVIDIA H200 (9.0)")


def test_a_driver_too_old_for_torch_is_told_in_one_line(
    runtime: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: int) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nUpdate it")

    monkeypatch.setattr(runtime, "set_device", refuse)
    with pytest.raises(StartupError) as caught:
        CudaPlatform().set_up(0, 1, 0)
    assert caught.value.exit_code == EXIT_INIT
    assert str(caught.value).endswith("torch cannot use NVIDIA H200: The NVIDIA driver on your system is"
                                      " too old (found version 12020).")  # fmt: skip


def test_memory_is_what_is_free_and_what_the_allocator_keeps(platform: CudaPlatform) -> None:
    assert platform.memory().available == 60 * GIB
    assert platform.kv_budget(2, memory_fraction=0.8) == pytest.approx(40 * GIB, abs=1)
    assert platform.is_out_of_memory(torch.OutOfMemoryError())
    assert not platform.is_out_of_memory(RuntimeError())


@pytest.mark.parametrize(
    ("requested", "stored", "want"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_weight_dtype(requested: Any, stored: torch.dtype, want: torch.dtype) -> None:
    assert CudaPlatform().weight_dtype(requested, stored) is want


def test_fp8_is_for_the_layers_that_may_be_rounded(
    platform: CudaPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[Tensor] = []
    monkeypatch.setattr(cuda, "fp8_linear", lambda weight, bias, device: rounded.append(weight))
    monkeypatch.setattr(platform, "_device", torch.device("cpu"))
    layer, head = torch.ones(2, 4, 4, dtype=torch.bfloat16)
    platform.pack_linear(layer, None, may_round=True)
    assert not rounded
    platform.use_fp8(torch.bfloat16)
    platform.pack_linear(layer, None, may_round=True)
    platform.pack_linear(head, None)
    assert [weight.data_ptr() for weight in rounded] == [layer.data_ptr()]
    assert platform.describe().endswith("layers in fp8")


def test_fp8_is_refused_on_older_chips_and_of_float32(runtime: FakeCuda, platform: CudaPlatform) -> None:
    with pytest.raises(StartupError, match="linearDtype 'fp8': it is made of weights in 16 bits"):
        platform.use_fp8(torch.float32)
    platform._capability = (8, 6)
    with pytest.raises(StartupError, match=r"capability 8\.6; fp8 takes 8\.9"):
        platform.use_fp8(torch.bfloat16)


def test_graphs_can_be_turned_off(platform: CudaPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.step_graphs(4, 64, BLOCK_SIZE) is not None
    monkeypatch.setenv(GRAPHS, "0")
    assert platform.step_graphs(4, 64, BLOCK_SIZE) is None


def test_a_replay_is_a_copy_and_a_launch(runtime: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = CudaDecodeGraphs(runtime, max_rows=3, max_seq_len=64, block_size=BLOCK_SIZE)
    attention = TritonAttention(AttentionSpec(2, 1, 16, torch.float32))
    begun: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(
        attention, "begin", lambda batch, table, lengths, block_size: begun.append((table, lengths))
    )
    seen: list[Tensor] = []

    def compute(batch: Batch) -> Tensor:
        seen.append(batch.input_ids)
        return torch.zeros(len(batch.input_ids), 5)

    graphs.capture(compute, attention, torch.device("cpu"), spare_from=40)
    assert runtime.calls.count("begin") == runtime.calls.count("end") == 3
    assert {len(table) for table, _ in begun} == {1, 2, 3}

    sequence = Sequence(0, np.array([7, 8, 9], np.int32), SamplingParams(max_tokens=1))
    sequence.block_table = [11]
    del runtime.calls[:]
    logits = graphs.forward(build_plan(StepKind.DECODE, [sequence], BLOCK_SIZE))
    assert logits.shape == (1, 5)
    assert runtime.calls == ["wait", "copied", "replay"]
    table, lengths = begun[-1]
    assert (seen[-1].tolist(), lengths.tolist(), table[0, 0].item()) == ([9], [3], 11)
