"""Paged attention on NVIDIA GPUs by our own Triton kernels, for prompts, pieces of them and decoding alike.

Not run on hardware: tests/cuda_interpreter says what has been checked.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from worker.attention.base import AttentionSpec, RotatingAttention
from worker.batch import Batch
from worker.config_values import MAX_INT
from worker.kv_pages import Int8Pages, KvPages, tensors_of

_MOST_SHARED = 64  # query heads of one KV head: they must fit into a tile
_LEAST_ROWS = 16  # of a matrix product
_TILE_BYTES = 16 * 1024  # of keys; with the values, the queries and what is read ahead it fits any chip
_KEYS_PER_PART = 256  # a part of a context that is worth a merge
_MOST_PARTS = 32
_PROGRAMS_PER_UNIT = 2  # so that one computes while another waits for memory


def refusal(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve these shapes, with what they could; None: they can."""
    share = spec.num_heads // spec.num_kv_heads
    if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return (
            f"attention in {spec.dtype} is not supported on deviceType 'cuda'; "
            "float32, float16 or bfloat16 is"
        )
    if spec.head_dim % 8 or spec.head_dim > 256:
        return f"head_dim {spec.head_dim}: deviceType 'cuda' takes multiples of 8 up to 256"
    if share > _MOST_SHARED:
        return (
            f"{spec.num_heads} heads for {spec.num_kv_heads} of keys: "
            f"deviceType 'cuda' takes at most {_MOST_SHARED} for each"
        )
    return None


@dataclass(frozen=True, slots=True)
class _Launch:
    """Neighbouring rows of a step that one call of the kernel serves."""

    tokens: slice  # of the step's
    starts: Tensor | None  # int32 [R + 1], counted from the first of `tokens`; None: a token for each row
    lengths: Tensor  # int32 [R]
    table: Tensor  # int32 [R, B]
    tile_rows: int
    tiles: int  # of the longest row
    splits: int


class TritonAttention(RotatingAttention):
    """All that changes from step to step is on the device; of rows of one query the steps can be captured."""

    def __init__(self, spec: AttentionSpec) -> None:
        """StartupError where `refusal` has a word to say."""
        if (why := refusal(spec)) is not None:
            raise StartupError(why, EXIT_INIT)
        # here, so that who asks for a refusal needs no Triton
        self._kernels: Any = importlib.import_module("worker.attention.triton_kernels")
        self._spec = spec
        self._share = spec.num_heads // spec.num_kv_heads
        self._padded = max(16, power_of_two(spec.head_dim))
        self._scale = spec.head_dim**-0.5 * math.log2(math.e)
        head_bytes = self._padded * spec.dtype.itemsize
        self._keys = max(16, min(64, _TILE_BYTES // head_bytes))
        # of a tile of several tokens
        self._query_rows = max(64 if head_bytes <= 512 else 32, power_of_two(self._share))
        self._units: int | None = None

    def begin_step(self, batch: Batch, block_size: int) -> None:
        packed = np.concatenate((batch.context_len, batch.block_table.ravel()))
        there = torch.from_numpy(packed).to(batch.slots.device, non_blocking=True)
        rows = len(batch.context_len)
        self.begin(batch, there[rows:].view(batch.block_table.shape), there[:rows], block_size)

    def begin(
        self,
        batch: Batch,
        table: Tensor,
        context_len: Tensor,
        block_size: int,
        splits: int | None = None,
    ) -> None:
        """As `begin_step`, with the lengths and the block table on the device: int32 [R], [R, B].

        Where all rows have one query, nothing but these tensors and `batch.slots` is read later on: a graph
        may replay `forward` on other numbers in them. `splits`: parts to compute each context in, a power of
        two; None: as many as keep the device busy, found by sizes alone.
        """
        self._block_size = block_size
        self._slots = batch.slots
        if self._units is None:
            self._units = _units_of(batch.slots.device)
        self._launches = []
        singles, rows = batch.num_single, len(context_len)
        if singles:
            tile_rows = max(_LEAST_ROWS, power_of_two(self._share))
            parts = splits or self._splits(singles, table.shape[1] * block_size)
            of_singles = slice(0, singles)
            self._launches.append(
                _Launch(of_singles, None, context_len[:singles], table[:singles], tile_rows, 1, parts)
            )
        if singles < rows:
            starts = batch.query_start[singles:] - singles
            tiles = -(-int(np.diff(starts).max()) // (self._query_rows // self._share))
            parts = splits or self._splits((rows - singles) * tiles, table.shape[1] * block_size)
            there = torch.from_numpy(starts).to(batch.slots.device, non_blocking=True)
            of_others = slice(singles, int(batch.query_start[-1]))
            self._launches.append(
                _Launch(
                    of_others, there, context_len[singles:], table[singles:], self._query_rows, tiles, parts
                )
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        self._store(q, k, v, None, k_cache, v_cache)
        return self._attend_all(q, k_cache, v_cache)

    def rotate_and_forward(
        self, qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: KvPages, v_cache: KvPages
    ) -> Tensor:
        heads = self._spec.num_heads
        q, k = qk[:, :heads], qk[:, heads : heads + self._spec.num_kv_heads]
        turned = self._store(q, k, v, (cos, sin), k_cache, v_cache)
        return self._attend_all(turned, k_cache, v_cache)

    def _store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        k_cache: KvPages,
        v_cache: KvPages,
    ) -> Tensor:
        """-> the queries, after the rotation if there is one."""
        spec = self._spec
        (k_pages, k_scales), (v_pages, v_scales) = _parts(k_cache), _parts(v_cache)
        cos, sin = rotation or (None, None)
        turned = q if rotation is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
        heads = spec.num_kv_heads + (spec.num_heads if rotation else 0)
        self._kernels.store_kernel[len(q), heads](
            q, k, v, turned, cos, sin, k_pages, v_pages, k_scales, v_scales, self._slots,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            spec.num_heads, spec.num_kv_heads, spec.head_dim, self._padded,
            num_warps=1,
        )  # fmt: skip
        return turned

    def _attend_all(self, q: Tensor, k_cache: KvPages, v_cache: KvPages) -> Tensor:
        spec = self._spec
        out = torch.empty((len(q), spec.num_heads, spec.head_dim), dtype=q.dtype, device=q.device)
        for launch in self._launches:
            self._attend(launch, q[launch.tokens], out[launch.tokens], k_cache, v_cache)
        return out.flatten(1)

    def _attend(self, launch: _Launch, q: Tensor, out: Tensor, k_cache: KvPages, v_cache: KvPages) -> None:
        spec = self._spec
        splits = launch.splits
        (k_pages, k_scales), (v_pages, v_scales) = _parts(k_cache), _parts(v_cache)
        means, log_sums = out, None
        if splits > 1:
            means = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
            log_sums = torch.empty(means.shape[:-1], dtype=torch.float32, device=q.device)
        self._kernels.attend_kernel[len(launch.lengths), spec.num_kv_heads, launch.tiles * splits](
            q, k_pages, v_pages, k_scales, v_scales, means, log_sums,
            launch.starts, launch.lengths, launch.table,
            self._scale, spec.window or MAX_INT, launch.table.stride(0), len(q), q.stride(0), q.stride(1),
            spec.num_kv_heads, self._share, spec.head_dim, self._padded,
            self._block_size, launch.tile_rows, self._keys, splits,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            heads = len(q) * spec.num_heads
            self._kernels.merge_kernel[heads,](
                means, log_sums, out, heads, spec.head_dim, self._padded, splits, num_warps=1
            )

    def _splits(self, tiles: int, longest: int) -> int:
        """Parts of a context, a power of two, for so many tiles of queries and texts of up to `longest`."""
        assert self._units is not None
        wanted = _PROGRAMS_PER_UNIT * self._units // (tiles * self._spec.num_kv_heads)
        worth = longest // _KEYS_PER_PART
        # a kernel is compiled for each number, so there are few
        return 1 << (max(1, min(wanted, worth, _MOST_PARTS)).bit_length() - 1)


def power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _units_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _parts(pages: KvPages) -> tuple[Tensor, Tensor | None]:
    """Numbers and, of int8, their scales."""
    values, *scales = tensors_of(pages)
    assert len(scales) == isinstance(pages, Int8Pages)
    return values, scales[0] if scales else None
