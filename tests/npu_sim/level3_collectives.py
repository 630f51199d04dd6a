"""One of two ranks, on a simulated device: torch.distributed over hccl. test_collectives.py starts both.

level3_collectives.py RANK MEETING_FILE
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  (makes the device and the backend known)

SIZE = 2
npu: Any = torch.npu  # type: ignore[attr-defined]


def share(rank: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    return (torch.arange(count) % 89 + 3 * rank).to(dtype)


def sums(rank: int) -> None:
    """More than one piece of the memory that ranks share, and the same bits on both."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        x = share(rank, dtype, 200_003).npu()  # type: ignore[attr-defined]
        dist.all_reduce(x)
        expected = sum(share(r, dtype, 200_003).double() for r in range(SIZE))
        assert torch.equal(x.cpu(), expected.to(dtype)), dtype


def least_and_gathered_and_sent(rank: int) -> None:
    number = torch.tensor([rank + 5], device="npu")
    dist.all_reduce(number, dist.ReduceOp.MIN)
    assert number.item() == 5
    gathered = torch.empty(SIZE, 3, 5, device="npu")
    dist.all_gather(list(gathered.unbind()), torch.full((3, 5), float(rank), device="npu"))
    assert gathered.mean((1, 2)).tolist() == [0.0, 1.0]
    sent = torch.full((4,), rank, device="npu")
    dist.broadcast(sent, 1)
    assert sent.tolist() == [1] * 4


def in_a_graph(rank: int) -> None:
    """A replay sums anew; its events outlive what torch_npu has destroyed of them by then."""
    graph, x = npu.NPUGraph(), torch.ones(8, device="npu")
    with npu.graph(graph):
        y = x * (rank + 1)
        dist.all_reduce(y)
    for factor in (1, 2, 5):
        x.fill_(factor)
        graph.replay()
        dist.all_reduce(torch.ones(1, device="npu"))
        assert y.tolist() == [3.0 * factor] * 8


def main(rank: int, meeting_file: Path) -> None:
    npu.set_device(rank)
    with torch.inference_mode():
        dist.init_process_group(
            "hccl",
            init_method=meeting_file.as_uri(),
            rank=rank,
            world_size=SIZE,
            timeout=timedelta(seconds=60),
        )
        sums(rank)
        least_and_gathered_and_sent(rank)
        in_a_graph(rank)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
