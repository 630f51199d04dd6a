"""The ranks of one instance as threads of the test: the same models and order of calls, and no network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from worker.parallel import ParallelGroup
from worker.shard import Shard

T = TypeVar("T")
_PATIENCE_S = 30.0


class ThreadGroup:
    """One rank's end of a group whose ranks lay down what they have and look at what the others have."""

    def __init__(self, shard: Shard, table: list[Tensor], barrier: threading.Barrier) -> None:
        self.shard = shard
        self._table = table
        self._barrier = barrier
        self.num_sums = 0

    def sum(self, x: Tensor) -> Tensor:
        self.num_sums += 1
        shares = self._exchange(x)
        total = shares[0].float()
        for share in shares[1:]:
            total = total + share
        return total.to(x.dtype)

    def join_columns(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=1)

    def least(self, number: int) -> int:
        return int(min(int(value) for value in self._exchange(torch.tensor(number))))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._table[self.shard.rank] = x.clone()
        self._barrier.wait(_PATIENCE_S)
        shares = list(self._table)
        self._barrier.wait(_PATIENCE_S)
        assert len({share.shape for share in shares}) == 1, "ranks call with different shapes"
        return shares


def on_ranks(size: int, work: Callable[[ParallelGroup], T], moe_ep: int = 1) -> list[T]:
    """What `work` returns on each rank; the first failure is raised, and ends the others.

    `moe_ep`: groups of ranks that experts are dealt to.
    """
    table = [torch.empty(0)] * size
    barrier = threading.Barrier(size)

    def run(rank: int) -> T:
        torch.set_num_threads(1)  # of this thread; the ranks share the machine
        try:
            return work(ThreadGroup(Shard(rank, size, moe_ep), table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        results = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for result in results if (error := result.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [result.result() for result in results]
