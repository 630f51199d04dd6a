"""torch_npu's own code on the stand-in, operators without arithmetic: what the server asks of a device.

Run by test_levels.py in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch_npu
from npu_stand_in.loading import launches, replays

DEVICE = torch.device("npu:0")
MIB = 2**20


def test_the_devices_are_those_that_ASCEND_RT_VISIBLE_DEVICES_lists() -> None:
    assert (
        torch.npu.is_available() and torch.npu.device_count() == 2
    )  # of three, the environment shows 2 and 0
    numbers = [torch.npu.get_device_properties(device).uuid.bytes[0] for device in range(2)]
    assert numbers == [2, 0]
    assert torch.npu.get_device_name(0) == "Ascend910B1"
    with pytest.raises(RuntimeError, match="device"):
        torch.npu.set_device(2)


def test_memory_is_counted_and_ends() -> None:
    free, total = torch.npu.mem_get_info(0)
    assert total == 512 * MIB
    held = torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)
    assert free - torch.npu.mem_get_info(0)[0] >= 64 * MIB
    assert torch.npu.memory_stats(0)["allocated_bytes.all.peak"] >= 64 * MIB
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(512 * MIB, dtype=torch.uint8, device=DEVICE)
    del held
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info(0)[0] >= free


def test_what_nobody_has_written_is_no_number() -> None:
    assert torch.empty(4, 1024, device=DEVICE).cpu().isnan().all()


def test_copies_arrive() -> None:
    values = torch.arange(1000, dtype=torch.float32)
    assert torch.equal(values.to(DEVICE).cpu(), values)
    assert torch.equal(values.pin_memory().to(DEVICE, non_blocking=True).cpu(), values)


def test_launches_are_counted_by_kernel() -> None:
    x, gamma = torch.zeros(3, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    before = launches()
    torch_npu.npu_rms_norm(x, gamma, 1e-6)
    torch_npu.npu_add_rms_norm(x, x, gamma, 1e-6)
    after = launches()
    assert {
        name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)
    } == {
        "aclnnRmsNorm": 1,
        "aclnnAddRmsNorm": 1,
    }


def test_the_front_end_refuses_tensors_of_other_devices_and_unknown_arguments() -> None:
    x = torch.zeros(3, 64, device=DEVICE)
    with pytest.raises(RuntimeError, match="gamma is on cpu"):
        torch_npu.npu_rms_norm(x, torch.ones(64), 1e-6)
    with pytest.raises(RuntimeError, match="eps"):
        torch_npu.npu_rms_norm(x, torch.ones(64, device=DEVICE), eps=1e-6)


def test_streams_and_events_are_in_order() -> None:
    side, begin, end = (
        torch.npu.Stream(),
        torch.npu.Event(enable_timing=True),
        torch.npu.Event(enable_timing=True),
    )
    with torch.npu.stream(side):
        begin.record()
        torch.ones(8, device=DEVICE)
        end.record()
    torch.npu.current_stream().wait_stream(side)
    end.synchronize()
    assert end.query() and begin.elapsed_time(end) >= 0


def test_a_captured_graph_is_replayed_as_often_as_it_is_asked() -> None:
    buffer = torch.zeros(4, 8, device=DEVICE)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        buffer * 2
    before = replays()
    graph.replay()
    graph.replay()
    torch.npu.synchronize()
    assert replays() - before == 2
