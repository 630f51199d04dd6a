"""The arithmetic behind the stand-in's operators, against plain torch: eager and in replayed graphs.

Run by test_levels.py in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch.nn import functional

DEVICE = torch.device("npu:0")
BLOCK, HEADS, KV_HEADS, DIM = 128, 4, 2, 32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_torch_operators_compute_on_the_device() -> None:
    x, weight = torch.randn(5, 16), torch.randn(7, 16)
    y = functional.linear(x.to(DEVICE), weight.to(DEVICE))
    assert y.device == DEVICE
    torch.testing.assert_close(y.cpu(), functional.linear(x, weight))
    assert torch.equal(x.to(DEVICE).to(torch.bfloat16).cpu(), x.bfloat16())
    assert torch.equal(x.to(DEVICE)[:, 3:9].contiguous().cpu(), x[:, 3:9])
    changed = x.to(DEVICE)
    changed[1:3] += 1
    expected = x.clone()
    expected[1:3] += 1
    assert torch.equal(changed.cpu(), expected)
    assert torch.equal(x.to(DEVICE).argmax(-1).cpu(), x.argmax(-1))


def test_results_whose_shape_the_values_decide() -> None:
    x = torch.tensor([0.0, 2.0, 0.0, 3.0])
    assert x.to(DEVICE).nonzero().flatten().tolist() == [1, 3]
    assert x.to(DEVICE)[x.to(DEVICE) > 0].tolist() == [2.0, 3.0]


def attend(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch_npu.npu_fused_infer_attention_score(
        q.view(len(q), 1, HEADS * DIM), cache, cache, block_table=table, input_layout="BSH", block_size=BLOCK,
        actual_seq_lengths_kv=lengths, num_heads=HEADS, num_key_value_heads=KV_HEADS, scale=DIM**-0.5,
    )[0]  # fmt: skip


def expected(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    rows = []
    for row, length in enumerate(lengths):
        keys = cache[table[row].long()].reshape(-1, KV_HEADS, DIM)[:length].transpose(0, 1).float()
        rows.append(
            functional.scaled_dot_product_attention(q[row].float().unsqueeze(1), keys, keys, enable_gqa=True)
        )
    return torch.stack(rows).reshape(len(q), 1, HEADS * DIM)


def test_a_replay_computes_anew_with_what_its_inputs_hold_now() -> None:
    x = torch.ones(3, device=DEVICE)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x * 2 + 1
    x.copy_(torch.tensor([1.0, 10.0, 100.0]))
    graph.replay()
    assert y.tolist() == [3.0, 21.0, 201.0]
    x.zero_()
    graph.replay()
    assert y.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("update_first", [False, True])
def test_a_replay_waits_for_the_lengths_of_its_attention(update_first: bool) -> None:
    cache = torch.randn(6, BLOCK, KV_HEADS * DIM).bfloat16()
    q = torch.randn(2, HEADS, DIM).bfloat16()
    table = torch.tensor([[3, 5], [1, 0]], dtype=torch.int32)
    q_npu, cache_npu, table_npu = q.to(DEVICE), cache.to(DEVICE), table.to(DEVICE)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        scaled = q_npu * 2
        out = attend(scaled, cache_npu, table_npu, [1, 1])
    for lengths in ([200, 17], [201, 18]):
        update = [{"actual_seq_lengths_kv": lengths}]
        if update_first:
            graph.update(cpu_update_input=update)
            graph.replay()
        else:
            graph.replay()
            graph.update(cpu_update_input=update)
        torch.npu.synchronize()
        torch.testing.assert_close(
            out.cpu().float(), expected(2 * q, cache, table, lengths), rtol=0.01, atol=0.01
        )


def test_a_replay_that_is_never_told_its_lengths_is_an_error_and_no_old_result() -> None:
    q = torch.randn(1, HEADS, DIM).bfloat16().to(DEVICE)
    cache = torch.zeros(1, BLOCK, KV_HEADS * DIM, dtype=torch.bfloat16, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        attend(q, cache, table, [1])
    graph.replay()
    with pytest.raises(RuntimeError, match="507046"):
        torch.npu.synchronize()
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [1]}])
    torch.npu.synchronize()


def test_limits_that_the_front_end_lets_pass_are_kept() -> None:
    q = torch.zeros(1, HEADS, DIM, device=DEVICE)
    cache = torch.zeros(1, BLOCK, KV_HEADS * DIM, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"query is torch\.float32"):
        attend(q, cache, table, [1])


def test_a_weight_in_fractal_nz_multiplies_as_it_did() -> None:
    """The numbers; the order in which a chip has them in memory is not modelled."""
    torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
    weight, x = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((64, 96), (5, 64)))
    scale, per_token = torch.full((96,), 1e-3), torch.rand(5)
    cast = torch_npu.npu_format_cast(weight.to(DEVICE), 29)
    assert int(torch_npu.get_npu_format(cast)) == 29 and torch.equal(cast.cpu(), weight)
    found = torch_npu.npu_quant_matmul(
        x.to(DEVICE), cast, scale.to(DEVICE), pertoken_scale=per_token.to(DEVICE), output_dtype=torch.bfloat16
    )
    exact = (x.float() @ weight.float()) * scale * per_token.unsqueeze(1)
    assert torch.equal(found.cpu(), exact.bfloat16())


@torch.inference_mode()  # with gradients torch_npu goes another way
def test_the_operators_of_experts_take_what_the_one_before_gives() -> None:
    """Types and shapes between them are those of torch_npu's front end."""
    tokens, logits, weights = (torch.randn(shape).bfloat16() for shape in ((5, 64), (5, 8), (8, 64, 32)))
    shares, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax(logits.to(DEVICE), k=2)
    rows, where, counts, _ = torch_npu.npu_moe_init_routing_v2(
        tokens.to(DEVICE), chosen, active_num=10, expert_num=8, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[0, 8], quant_mode=-1,
    )  # fmt: skip
    (products,) = torch_npu.npu_grouped_matmul(
        [rows], [weights.to(DEVICE)], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )
    found = torch_npu.npu_moe_token_unpermute(products, where, shares).cpu().float()
    every = torch.einsum("th,ehn->ten", tokens.float(), weights.float())
    full = torch.zeros(5, 8).scatter_(1, chosen.cpu().long(), shares.cpu().float())
    # products are rounded to bfloat16 before they are added
    torch.testing.assert_close(found, torch.einsum("ten,te->tn", every, full), rtol=0.02, atol=0.02 * 8)
