"""Writing keys and values into the paged cache, and attention over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_stand_in.reference.registry import HALVES, computes, require, require_defaults, require_type

_CAUSAL = 3  # sparse_mode: aligned bottom-right, with the compressed mask
_BAND = 4
_COMPRESSED = (2048, 2048)  # the one mask all sequences share
_UNBOUNDED = 2**31 - 1


@computes("npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """key, value: [T, KV, D]; caches: [blocks, block, KV, D], changed in place; slot_mapping: [T]."""
    name = "npu_scatter_pa_kv_cache"
    require(
        name, cache_mode in (None, "Norm"), f"cache_mode {cache_mode!r}: only the layout Norm is modelled"
    )
    require(name, compress_lens is compress_seq_offsets is seq_lens is None, "compression is not modelled")
    tensors = (key, value, key_cache, value_cache)
    require(
        name, all(tensor.is_contiguous() for tensor in (*tensors, slot_mapping)), "all must be contiguous"
    )
    require(name, len({tensor.dtype for tensor in tensors}) == 1, "keys, values and caches have one type")
    require(
        name, key.dim() == 3 and key_cache.dim() == 4, "keys are [T, KV, D], caches [blocks, block, KV, D]"
    )
    require(name, key.shape[:2] == value.shape[:2], "keys and values have equal T and KV")
    require(
        name,
        key.shape[1:] == key_cache.shape[2:] and value.shape[1:] == value_cache.shape[2:],
        "KV and D of the cache",
    )
    require_type(name, "slot_mapping", slot_mapping, torch.int32, torch.int64)
    slots = slot_mapping.long()
    room = key_cache.shape[0] * key_cache.shape[1]
    require(name, slots.shape == key.shape[:1], "one slot for each token")
    require(
        name,
        not len(slots) or 0 <= int(slots.min()) <= int(slots.max()) < room,
        f"slots lie in [0, {room - 1}]",
    )
    require(name, len(slots.unique()) == len(slots), "no slot is written twice")
    key_cache.view(room, *key.shape[1:])[slots] = key
    value_cache.view(room, *value.shape[1:])[slots] = value


@computes("npu_fused_infer_attention_score")
def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = _UNBOUNDED,
    next_tokens: int = _UNBOUNDED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """query: [T, H, D] in the layout TND, [B, 1, H * D] in BSH -> the like of it, and no lse."""
    name = "npu_fused_infer_attention_score"
    require_defaults(name, other)
    require(name, not softmax_lse_flag, "not modelled: softmax_lse_flag")
    del inner_precise
    kv_heads = num_key_value_heads or num_heads
    require(
        name,
        num_heads % kv_heads == 0 and num_heads // kv_heads <= 64,
        "H is a multiple of KV, at most 64 times",
    )
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        require_type(name, label, tensor, *HALVES)
        require(name, tensor.dtype == query.dtype, f"{label} has the type of query")
        require(name, tensor.is_contiguous(), f"{label} must be contiguous")
    require(name, actual_seq_lengths_kv is not None, "actual_seq_lengths_kv must be given")
    assert actual_seq_lengths_kv is not None
    if input_layout == "TND":
        require(name, query.dim() == 3 and query.shape[1] == num_heads, "TND: query is [T, H, D]")
        width = query.shape[2]
        require(name, actual_seq_lengths is not None, "TND: actual_seq_lengths must be given")
        ends = list(actual_seq_lengths or ())
        rows = query
    else:
        require(name, input_layout == "BSH", f"layout {input_layout!r}: TND and BSH are modelled")
        require(name, query.dim() == 3 and query.shape[1] == 1, "BSH: one token of each sequence is modelled")
        require(name, sparse_mode == 0 and atten_mask is None, "BSH with one token needs no mask")
        width = query.shape[2] // num_heads
        ends = list(range(1, len(query) + 1))
        rows = query.view(-1, num_heads, width)
    require(name, width % 16 == 0 and width <= 512, f"D = {width} is a multiple of 16, at most 512")
    require(
        name,
        bool(ends) and ends == sorted(ends) and ends[-1] == len(rows),
        "running totals of query lengths, up to T",
    )
    require(name, len(actual_seq_lengths_kv) == len(ends), "as many lengths of keys as of queries")
    _check_mask(name, sparse_mode, atten_mask)
    window = pre_tokens if sparse_mode == _BAND else _UNBOUNDED
    require(
        name, sparse_mode != _BAND or next_tokens == 0, "a band with next_tokens other than 0 is not modelled"
    )
    if block_table is not None:
        keys, values = _paged(
            name, key, value, block_table, actual_seq_lengths_kv, kv_heads, width, block_size
        )
    else:
        keys, values = _ragged(name, key, value, actual_seq_lengths_kv)
    result = torch.empty_like(rows)
    for start, end, k, v in zip([0, *ends], ends, keys, values, strict=False):
        result[start:end] = _attended(rows[start:end], k, v, scale, sparse_mode in (_CAUSAL, _BAND), window)
    return result.view_as(query), torch.zeros(1)


def _check_mask(name: str, sparse_mode: int, mask: Tensor | None) -> None:
    require(name, sparse_mode in (0, _CAUSAL, _BAND), f"sparse_mode {sparse_mode}: 0, 3 and 4 are modelled")
    if sparse_mode == 0:
        require(name, mask is None, "sparse_mode 0 with a mask is not modelled")
        return
    require(name, mask is not None and tuple(mask.shape) == _COMPRESSED, "the mask is [2048, 2048]")
    assert mask is not None
    require_type(name, "atten_mask", mask, torch.bool, torch.int8, torch.uint8)
    expected = torch.ones(_COMPRESSED, dtype=torch.bool).triu_(1)
    require(name, torch.equal(mask.bool(), expected), "the mask has ones strictly above its diagonal")


def _paged(
    name: str,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    lengths: Sequence[int],
    kv_heads: int,
    width: int,
    block: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each sequence, [length, KV, D]; with a table `lengths` are plain lengths."""
    require_type(name, "block_table", table, torch.int32)
    require(name, table.dim() == 2 and len(table) == len(lengths), "block_table has a row for each sequence")
    require(
        name, block % 128 == 0 and 0 < block <= 512, f"block_size {block} is a multiple of 128, at most 512"
    )
    for cache in (key, value):
        require(
            name,
            tuple(cache.shape[1:]) == (block, kv_heads * width),
            "caches are [blocks, block_size, KV * D]",
        )
    require(name, kv_heads * width <= 65535, "KV * D is at most 65535")
    gathered: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, length in zip(table.long(), lengths, strict=True):
        ids = row[: -(-length // block)]
        require(name, length <= block * table.shape[1], "a length beyond the blocks of its row")
        require(
            name,
            not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < len(key),
            "a block that is not there",
        )
        for cache, found in zip((key, value), gathered, strict=True):
            found.append(cache[ids].reshape(-1, kv_heads, width)[:length])
    return gathered


def _ragged(
    name: str, key: Tensor, value: Tensor, totals: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same without a cache: key and value are [T, KV, D], `totals` running totals of lengths."""
    require(
        name,
        list(totals) == sorted(totals) and totals[-1] == len(key),
        "running totals of key lengths, up to T",
    )
    sizes = [end - start for start, end in zip([0, *totals], totals, strict=False)]
    return list(key.split(sizes)), list(value.split(sizes))


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    """q: [Q, H, D]; k, v: [S, KV, D] -> [Q, H, D]. A query that sees no key gets zeros."""
    share = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,shd->hqs", q.float(), k.float().repeat_interleave(share, 1)) * scale
    distance = torch.arange(len(q)).unsqueeze(1) + len(k) - len(q) - torch.arange(len(k))
    unseen = (
        ((distance < 0) | (distance > window)) if causal else torch.zeros_like(distance, dtype=torch.bool)
    )
    weights = scores.masked_fill_(unseen, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqs,shd->qhd", weights, v.float().repeat_interleave(share, 1)).to(q.dtype)
