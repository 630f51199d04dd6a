"""The reference arithmetic of the stand-in against torch's own operators, and the limits it enforces.

Needs neither torch_npu nor the stand-in. What it proves: our reading of the operators' descriptions is what
textbook formulas give. What not: that the chip reads its descriptions as we do.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
reference: Any = importlib.import_module("npu_stand_in.reference")

BLOCK, KV, HEADS, WIDTH = 128, 2, 4, 32


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    return reference.REFERENCES[f"npu::{name}"](*args, **kwargs)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor, steps: int = 2) -> None:
    """Both rounded to the same type from float32: as far apart as `steps` of its last place."""
    tolerance = steps * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def mask() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.int8).triu_(1)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """torch's attention of one sequence: q [Q, H, D]; k, v [S, KV, D]; seen [Q, S]."""
    rows = functional.scaled_dot_product_attention(
        *(x.float().transpose(0, 1).unsqueeze(0) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    )
    return rows[0].transpose(0, 1).to(q.dtype)


def paged_case(lengths: list[int]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """-> caches [blocks, BLOCK, KV * D] with NaN where nothing was written, keys and values, the table."""
    per_row = [-(-length // BLOCK) for length in lengths]
    shuffled = torch.randperm(sum(per_row), generator=torch.Generator().manual_seed(3)).int()
    table = torch.zeros(len(lengths), max(per_row), dtype=torch.int32)
    caches = [torch.full((sum(per_row), BLOCK, KV, WIDTH), torch.nan, dtype=torch.bfloat16) for _ in "kv"]
    written: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row, (length, blocks) in enumerate(zip(lengths, shuffled.split(per_row), strict=True)):
        table[row, : len(blocks)] = blocks
        places = torch.arange(length)
        slots = blocks[places // BLOCK] * BLOCK + places % BLOCK
        pair = [random(length, KV, WIDTH, seed=10 * row + which) for which in (4, 5)]
        call("npu_scatter_pa_kv_cache", *pair, *caches, slots.int(), cache_mode="Norm")
        for found, tensor in zip(written, pair, strict=True):
            found.append(tensor)
    flat = [cache.view(len(cache), BLOCK, KV * WIDTH) for cache in caches]
    return flat[0], flat[1], *written, table


COMMON = {"num_heads": HEADS, "num_key_value_heads": KV, "scale": WIDTH**-0.5}


@pytest.mark.parametrize("window", [None, 5, 200])
def test_paged_attention_is_causal_from_the_end_of_each_context(window: int | None) -> None:
    """A whole prompt, a piece of one, and one token, over shuffled blocks."""
    lengths, queries = [130, 300, 7], [130, 40, 1]
    k_cache, v_cache, keys, values, table = paged_case(lengths)
    q = random(sum(queries), HEADS, WIDTH, seed=9)
    band = (
        {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tokens": window, "next_tokens": 0}
    )
    found, _ = call(
        "npu_fused_infer_attention_score", q, k_cache, v_cache, atten_mask=mask(), block_table=table,
        input_layout="TND", block_size=BLOCK, actual_seq_lengths=torch.tensor(queries).cumsum(0).tolist(),
        actual_seq_lengths_kv=lengths, **band, **COMMON,
    )  # fmt: skip
    for rows, query, k, v in zip(found.split(queries), q.split(queries), keys, values, strict=True):
        place = torch.arange(len(k) - len(query), len(k)).unsqueeze(1)
        seen = torch.arange(len(k)) <= place
        if window is not None:
            seen &= torch.arange(len(k)) >= place - window
        close(rows, dense(query, k, v, seen))


def test_a_decode_step_sees_all_of_each_context() -> None:
    lengths = [130, 1, 128]
    k_cache, v_cache, keys, values, table = paged_case(lengths)
    q = random(3, 1, HEADS * WIDTH, seed=9)
    found, _ = call(
        "npu_fused_infer_attention_score", q, k_cache, v_cache, block_table=table, input_layout="BSH",
        block_size=BLOCK, actual_seq_lengths_kv=lengths, **COMMON,
    )  # fmt: skip
    for row, query, k, v in zip(found, q, keys, values, strict=True):
        everything = torch.ones(1, len(k), dtype=torch.bool)
        close(row.view(1, HEADS, WIDTH), dense(query.view(1, HEADS, WIDTH), k, v, everything))


def test_without_a_cache_lengths_of_keys_are_running_totals() -> None:
    q, k, v = random(9, HEADS, WIDTH), random(9, KV, WIDTH, seed=2), random(9, KV, WIDTH, seed=3)
    found, _ = call(
        "npu_fused_infer_attention_score", q, k, v, atten_mask=mask(), input_layout="TND", sparse_mode=3,
        actual_seq_lengths=[4, 9], actual_seq_lengths_kv=[4, 9], **COMMON,
    )  # fmt: skip
    for part in (slice(0, 4), slice(4, 9)):
        size = part.stop - part.start
        close(found[part], dense(q[part], k[part], v[part], torch.ones(size, size, dtype=torch.bool).tril()))


def test_norms_are_those_of_torch_and_add_before() -> None:
    x, y, weight = random(5, 64), random(5, 64, seed=2), random(64, seed=3)
    found, rstd = call("npu_rms_norm", x, weight, 1e-5)
    close(found, functional.rms_norm(x.float(), (64,), weight.float(), 1e-5).bfloat16())
    assert rstd.shape == (5, 1) and rstd.dtype == torch.float32
    normed, _, total = call("npu_add_rms_norm", x, y, weight, 1e-5)
    assert torch.equal(total, x + y)
    close(normed, functional.rms_norm((x + y).float(), (64,), weight.float(), 1e-5).bfloat16())


def test_swiglu_has_the_gate_first() -> None:
    gate, up = random(3, 16), random(3, 16, seed=2)
    close(
        call("npu_swiglu", torch.cat((gate, up), -1)), (functional.silu(gate.float()) * up.float()).bfloat16()
    )


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    x = random(1, 6, HEADS, 64)
    angle = torch.outer(torch.arange(6.0), 10000.0 ** -(torch.arange(0, 64, 2) / 64))
    cos, sin = (f(angle).repeat(1, 2).bfloat16().view(1, 6, 1, 64) for f in (torch.cos, torch.sin))
    turn = torch.complex(cos[..., :32].float(), sin[..., :32].float())
    pairs = torch.complex(*(half.float() for half in x.chunk(2, -1))) * turn
    expected = torch.cat((pairs.real, pairs.imag), -1).bfloat16()
    close(call("npu_rotary_mul", x, cos, sin), expected, steps=4)
    query, key = x.clone(), x[:, :, :KV].clone()
    call("npu_apply_rotary_pos_emb", query, key, cos, sin)
    close(query, expected, steps=4)
    assert torch.equal(key, query[:, :, :KV])


def test_quantised_products_are_near_the_ones_they_stand_for() -> None:
    """w8a8 in both ways and w8a16, against float32: as far apart as half a step of int8 per number."""
    x, weight = random(6, 256), random(256, 48, dtype=torch.float32, seed=2)
    bias = random(48, dtype=torch.float32, seed=3)
    scale = weight.abs().amax(0) / 127
    stored = (weight / scale).round().to(torch.int8)
    expected = x.float() @ weight + bias
    numbers, per_token = call("npu_dynamic_quant", x)
    dynamic = call(
        "npu_quant_matmul", numbers, stored, scale, pertoken_scale=per_token, bias=bias, output_dtype=15
    )
    step = x.float().abs().max() / 127
    inverse = torch.full((256,), 1 / step).bfloat16()
    fixed = call("npu_quantize", x, inverse, torch.zeros_like(inverse), 12, -1, False)
    whole = (bias / (scale * step)).round().int()
    static = call(
        "npu_quant_matmul",
        fixed,
        stored,
        scale * step,
        bias=whole,
        output_dtype=15,
    )
    wide = call("npu_weight_quant_batchmatmul", x, stored, scale.bfloat16(), bias=bias)
    for found, at_most in ((dynamic, 0.02), (static, 0.02), (wide, 0.02)):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() / expected.norm() < at_most


def test_a_product_without_an_output_type_is_int8() -> None:
    """The operator's default, and a trap: nothing else says so."""
    ones = torch.ones(2, 4, dtype=torch.int8)
    found = call("npu_quant_matmul", ones, ones.t().contiguous(), torch.full((2,), 100.0))
    assert found.dtype == torch.int8 and found.tolist() == [[127, 127], [127, 127]]


def test_scales_for_float16_travel_as_bits() -> None:
    x, weight = torch.full((2, 8), 3, dtype=torch.int8), torch.full((8, 2), -2, dtype=torch.int8)
    scale = torch.tensor([0.25, 1.5])
    found = call("npu_quant_matmul", x, weight, call("npu_trans_quant_param", scale), output_dtype=5)
    assert found.dtype == torch.float16 and found.tolist() == [[-12.0, -72.0], [-12.0, -72.0]]


def test_top_k_top_p_keeps_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.3, 0.2]]))
    ks, ps = torch.tensor([2, 4], dtype=torch.int32), torch.tensor([1.0, 0.5])
    kept = call("npu_top_k_top_p", logits, ps, ks).isfinite()
    assert kept.tolist() == [[False, True, False, True], [False, True, True, False]]
    assert call("npu_top_k_top_p", logits, torch.zeros(2), None).isfinite().sum(-1).tolist() == [1, 1]


def test_experts_found_gathered_and_joined_are_the_dense_mixture() -> None:
    tokens, experts, k = random(7, 32, dtype=torch.float32), 5, 2
    weights = random(experts, 32, 16, dtype=torch.float32, seed=2)
    logits = random(7, experts, dtype=torch.float32, seed=3)
    shares, chosen, _ = call("npu_moe_gating_top_k_softmax", logits, None, k)
    rows, where, counts, _ = call(
        "npu_moe_init_routing_v2", tokens, chosen, active_num=7 * k, expert_num=experts, quant_mode=-1,
        expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, experts],
    )  # fmt: skip
    (products,) = call(
        "npu_grouped_matmul",
        [rows],
        [weights],
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    found = call("npu_moe_token_unpermute", products, where, shares)
    every = torch.einsum("th,ehn->ten", tokens, weights)
    full = torch.zeros(7, experts).scatter_(1, chosen.long(), logits.softmax(-1).gather(1, chosen.long()))
    torch.testing.assert_close(found, torch.einsum("ten,te->tn", every, full), rtol=1e-5, atol=1e-5)


def caches(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(2, BLOCK, KV, WIDTH, dtype=dtype) for _ in "kv"]


def pair(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(2, KV, WIDTH, dtype=dtype) for _ in "kv"]


def slots(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def decode(**changes: Any) -> Any:
    """A call within the limits, with `changes`."""
    cache = torch.zeros(2, BLOCK, KV * WIDTH, dtype=torch.bfloat16)
    given = {
        "query": torch.zeros(1, 1, HEADS * WIDTH, dtype=torch.bfloat16), "key": cache, "value": cache,
        "block_table": torch.zeros(1, 1, dtype=torch.int32), "input_layout": "BSH", "block_size": BLOCK,
        "actual_seq_lengths_kv": [5], **COMMON, **changes,
    }  # fmt: skip
    return call("npu_fused_infer_attention_score", **given)


def test_the_call_whose_changes_are_refused_is_none_itself() -> None:
    decode()
    call("npu_scatter_pa_kv_cache", *pair(), *caches(), slots(1, 255), cache_mode="Norm")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"query": torch.zeros(1, 1, HEADS * WIDTH)}, "query is torch.float32"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int64)}, "block_table is torch.int64"),
        ({"block_table": torch.full((1, 1), 2, dtype=torch.int32)}, "a block that is not there"),
        ({"block_table": torch.full((1, 1), -1, dtype=torch.int32)}, "a block that is not there"),
        ({"actual_seq_lengths_kv": [BLOCK + 1]}, "beyond the blocks of its row"),
        ({"actual_seq_lengths_kv": [5, 5]}, "as many lengths"),
        ({"block_size": 64}, "multiple of 128"),
        ({"num_key_value_heads": 3}, "H is a multiple of KV"),
        ({"atten_mask": torch.zeros(2048, 2048, dtype=torch.int8)}, "needs no mask"),
        ({"input_layout": "BNSD"}, "TND and BSH"),
        ({"learnable_sink": torch.zeros(1)}, "not modelled: learnable_sink"),
    ],
)
def test_attention_outside_its_limits_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(reference.OutsideLimits, match=what):
        decode(**changes)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((*pair(), *caches(), slots(1, 1)), "written twice"),
        ((*pair(), *caches(), slots(1, 256)), "slots lie in"),
        ((*pair(), *caches(), slots(-1, 1)), "slots lie in"),
        ((*pair(torch.float16), *caches(), slots(1, 2)), "one type"),
        ((*(x.mT.contiguous().mT for x in pair()), *caches(), slots(1, 2)), "contiguous"),
    ],
)  # fmt: skip
def test_writing_outside_its_limits_is_refused(arguments: Any, what: str) -> None:
    with pytest.raises(reference.OutsideLimits, match=what):
        call("npu_scatter_pa_kv_cache", *arguments, cache_mode="Norm")


def test_the_default_layout_of_the_cache_is_refused() -> None:
    """It is PA_NZ, which nobody means who does not say so."""
    with pytest.raises(reference.OutsideLimits, match="PA_NZ"):
        call("npu_scatter_pa_kv_cache", *pair(), *caches(), slots(1, 2))
