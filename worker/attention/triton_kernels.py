"""Triton kernels of paged attention: one stores keys and values, one attends, one merges parts of a context.

What differs from step to step is read on the device; a launch depends on sizes alone, so it can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl

_UNSEEN = tl.constexpr(-1e30)  # a score that no weight comes of; an infinity would make NaN of a row of them
_LEAST = tl.constexpr(1.1754943508222875e-38)  # instead of the scale of a row of zeros
_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: where float32 has whole numbers alone


@triton.jit
def to_whole(x):
    """x: float32, of less than 2**22 -> the nearest whole number, an even one of two."""
    return (x + _TO_WHOLE) - _TO_WHOLE


@triton.jit
def scale_of(row, LARGEST: tl.constexpr):
    """row: float32, one dimension -> what brings the largest of it to LARGEST when it is divided by that."""
    return tl.maximum(tl.div_rn(tl.max(tl.abs(row), 0), LARGEST), _LEAST)


@triton.jit
def _load_head(heads, source, cos, sin, turn, D: tl.constexpr, D_PADDED: tl.constexpr):
    """The head at `source`; with cos and sin of `RotaryTable.gather`, rotated by those at `turn`."""
    d = tl.arange(0, D_PADDED)
    x = tl.load(heads + source + d, mask=d < D, other=0.0)
    if cos is not None:
        across = tl.load(heads + source + (d + D // 2) % D, mask=d < D, other=0.0).to(tl.float32)
        along = x.to(tl.float32) * tl.load(cos + turn + d, mask=d < D, other=0.0).to(tl.float32)
        x = (along + across * tl.load(sin + turn + d, mask=d < D, other=0.0).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _store_head(x, pages, scales, index, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Head `index` of the cache becomes x; int8 as worker/layers/quantized.py has it."""
    d = tl.arange(0, D_PADDED)
    if scales is not None:
        wide = x.to(tl.float32)
        scale = scale_of(wide, 127.0)
        x = tl.minimum(tl.maximum(to_whole(tl.div_rn(wide, scale)), -127.0), 127.0)
        tl.store(scales + index, scale)
    tl.store(pages + index * D + d, x.to(pages.dtype.element_ty), mask=d < D)


@triton.jit
def store_kernel(
    q, k, v, turned, cos, sin, k_pages, v_pages, k_scales, v_scales, slots,
    q_token, q_head, k_token, k_head, v_token, v_head,  # strides
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, KV heads), and where there is a rotation (tokens, KV heads + heads).

    With `cos` and `sin`, [tokens, D], keys are rotated on their way, and queries into `turned`, dense.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    turn = token * D
    if head < KV_HEADS:
        index = tl.load(slots + token).to(tl.int64) * KV_HEADS + head
        key = _load_head(k, token * k_token + head * k_head, cos, sin, turn, D, D_PADDED)
        _store_head(key, k_pages, k_scales, index, D, D_PADDED)
        value = _load_head(v, token * v_token + head * v_head, None, None, turn, D, D_PADDED)
        _store_head(value, v_pages, v_scales, index, D, D_PADDED)
    if cos is not None:  # noqa: SIM102  what is None must be out of the way before the other is compiled
        if head >= KV_HEADS:
            d = tl.arange(0, D_PADDED)
            head -= KV_HEADS
            query = _load_head(q, token * q_token + head * q_head, cos, sin, turn, D, D_PADDED)
            tl.store(turned + (token * HEADS + head) * D + d, query, mask=d < D)


@triton.jit(do_not_specialize=["window", "table_width", "num_tokens"])
def attend_kernel(
    q, k_pages, v_pages, k_scales, v_scales, out, log_sums, starts, lengths, table,
    scale, window, table_width, num_tokens, q_token, q_head,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, KV heads, tiles of queries * SPLITS).

    The query heads that share a KV head are rows of one matrix, ROWS // SHARE tokens of them. Each part of
    the context gives its own weighted mean, [SPLITS, num_tokens, heads, D], and with SPLITS > 1 the base-2
    logarithm of its sum of weights. `starts` None: every sequence has one query. `scale` includes log2(e).
    """
    TOKENS: tl.constexpr = ROWS // SHARE
    HEADS: tl.constexpr = KV_HEADS * SHARE
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = tl.program_id(2) // SPLITS
    part = tl.program_id(2) % SPLITS
    if starts is None:
        first = sequence
        queries = 1
    else:
        first = tl.load(starts + sequence)
        queries = tl.load(starts + sequence + 1) - first
    if tile * TOKENS < queries:
        context = tl.load(lengths + sequence)
        r = tl.arange(0, ROWS)
        d = tl.arange(0, D_PADDED)
        token = tile * TOKENS + r // SHARE
        live = (r < TOKENS * SHARE) & (token < queries)
        head = kv_head * SHARE + r % SHARE
        query_at = (first + token).to(tl.int64) * q_token + head * q_head
        queries_tile = tl.load(
            q + query_at[:, None] + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0
        )
        place = context - queries + token  # of each query in its text
        # the keys that any query of the tile sees, and of these the ones of this part
        begin = tl.maximum(context - queries + tile * TOKENS - window + 1, 0)
        end = tl.minimum(context, context - queries + (tile + 1) * TOKENS)
        share = tl.cdiv(tl.cdiv(end - begin, SPLITS), TILE) * TILE
        begin = begin + part * share
        end = tl.minimum(end, begin + share)

        largest = tl.full([ROWS], _UNSEEN, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, D_PADDED], tl.float32)
        for position in range(begin, end, TILE):
            c = position + tl.arange(0, TILE)
            inside = c < end
            page = tl.load(table + sequence * table_width + c // PAGE, mask=inside, other=0).to(tl.int64)
            index = (page * PAGE + c % PAGE) * KV_HEADS + kv_head
            # what lies beyond is never read: it may be NaN, and a weight of zero does not help against that
            keys = tl.load(
                k_pages + index[None, :] * D + d[:, None], mask=inside[None, :] & (d[:, None] < D), other=0
            )
            values = tl.load(
                v_pages + index[:, None] * D + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0
            )
            if k_scales is not None:
                k_scale = tl.load(k_scales + index, mask=inside, other=0.0)
                v_scale = tl.load(v_scales + index, mask=inside, other=0.0)
                keys = (keys.to(tl.float32) * k_scale[None, :]).to(queries_tile.dtype)
                values = (values.to(tl.float32) * v_scale[:, None]).to(queries_tile.dtype)
            scores = tl.dot(queries_tile, keys, input_precision="ieee") * scale
            ahead = place[:, None] - c[None, :]
            seen = inside[None, :] & (ahead >= 0) & (ahead < window)
            scores = tl.where(seen, scores, _UNSEEN)
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.where(seen, tl.exp2(scores - new_largest[:, None]), 0.0)
            fade = tl.exp2(largest - new_largest)
            total = total * fade + tl.sum(weights, 1)
            mean = mean * fade[:, None]
            mean += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            largest = new_largest

        mean = mean / tl.where(total > 0, total, 1.0)[:, None]
        result = (part * num_tokens + first + token).to(tl.int64) * HEADS + head
        tl.store(
            out + result[:, None] * D + d[None, :],
            mean.to(out.dtype.element_ty),
            mask=live[:, None] & (d[None, :] < D),
        )
        if SPLITS > 1:
            log_sum = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), _UNSEEN)
            tl.store(log_sums + result, log_sum, mask=live)


@triton.jit(do_not_specialize=["num_heads"])
def merge_kernel(
    means, log_sums, out, num_heads,
    D: tl.constexpr, D_PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: num_heads, those of all tokens; means: [SPLITS, num_heads, D] -> out: [num_heads, D]."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    part = tl.arange(0, SPLITS)
    at = part.to(tl.int64) * num_heads + head
    log_sum = tl.load(log_sums + at)
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))  # a part without keys: 0
    parts = tl.load(means + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * D + d, merged.to(out.dtype.element_ty), mask=d < D)
