"""The ranks of one instance as a group of torch.distributed, and how what they compute becomes one."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.shard import WHOLE, Shard

log = logging.getLogger("llm.parallel")


class ParallelGroup(Protocol):
    """Every rank calls the same methods in the same order, with tensors of the same shapes."""

    shard: Shard

    def sum(self, x: Tensor) -> Tensor:
        """x: each rank's share of a sum -> the whole of it, the same bits on every rank. May reuse x."""

    def join_columns(self, x: Tensor) -> Tensor:
        """x: [R, n], this rank's columns -> [R, size * n], those of all in the order of ranks."""

    def least(self, number: int) -> int:
        """The smallest of what the ranks give."""


class Alone:
    """A group of one rank: nothing to exchange."""

    shard = WHOLE

    def sum(self, x: Tensor) -> Tensor:
        return x

    def join_columns(self, x: Tensor) -> Tensor:
        return x

    def least(self, number: int) -> int:
        return number


class DistributedGroup:
    """The default process group of this process."""

    def __init__(self, shard: Shard, device: torch.device, backend: str) -> None:
        self.shard = shard
        self._device = device
        # Gloo adds in an order that follows a number's place in the buffer: a row's bits would depend on its
        # batch mates. Gathering and adding in the order of ranks does not, and moves as much for two ranks.
        self._adds_itself = backend == "gloo"

    def sum(self, x: Tensor) -> Tensor:
        if not self._adds_itself:
            dist.all_reduce(x)
            return x
        shares = self._gather(x)
        total = shares[0].float()  # rounded once, not once per rank
        for share in shares[1:]:
            total = total + share
        return total.to(x.dtype)

    def join_columns(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        return self._gather(x).transpose(0, 1).reshape(rows, self.shard.size * columns)

    def least(self, number: int) -> int:
        value = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value.item())

    def _gather(self, x: Tensor) -> Tensor:
        """-> [size, *x.shape]."""
        gathered = x.new_empty((self.shard.size, *x.shape))
        dist.all_gather(list(gathered.unbind()), x.contiguous())
        return gathered


def join_group(
    shard: Shard, device: torch.device, backend: str, meeting_file: Path, timeout_s: float
) -> ParallelGroup:
    """Wait until all ranks of the instance are there. `meeting_file`: where they meet, new for each group.

    Raises StartupError when one does not come within `timeout_s`.
    """
    if shard.size == 1:
        return Alone()
    try:
        dist.init_process_group(
            backend,
            init_method=meeting_file.as_uri(),
            rank=shard.rank,
            world_size=shard.size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise StartupError(
            f"rank {shard.rank} cannot join the {shard.size} ranks of its instance over {backend}:"
            f" {reason[0] if reason else type(error).__name__}; the log of the other ranks tells which is"
            " missing, workerInitTimeoutSec how long they are waited for",
            EXIT_INIT,
        ) from None
    log.info("rank %d of %d has joined over %s", shard.rank, shard.size, backend)
    return DistributedGroup(shard, device, backend)
