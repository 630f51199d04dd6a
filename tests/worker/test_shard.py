"""Which rank holds what, and which models can be divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import StartupError
from worker.config_values import ConfigValues
from worker.hf_config import DecoderConfig, ExpertsConfig
from worker.models.configs import parse_llama
from worker.shard import Shard, check_divides

CONFIG = parse_llama(
    ConfigValues(
        Path("config.json"),
        {
            "vocab_size": 600, "hidden_size": 96, "intermediate_size": 120, "num_hidden_layers": 1,
            "num_attention_heads": 12, "num_key_value_heads": 3, "max_position_embeddings": 64,
        },
    )
)  # fmt: skip


@given(size=st.integers(1, 16), per_rank=st.integers(1, 5), width=st.integers(1, 9))
def test_parts_are_equal_in_order_and_all_there_is(size: int, per_rank: int, width: int) -> None:
    units = size * per_rank
    numbers = list(range(units * width))
    parts = [numbers[Shard(rank, size).part(len(numbers), units)] for rank in range(size)]
    assert [number for part in parts for number in part] == numbers
    assert {len(part) for part in parts} == {per_rank * width}


@given(copies=st.integers(1, 8), units=st.integers(1, 8), width=st.integers(1, 9))
def test_units_that_are_too_few_are_held_by_neighbours(copies: int, units: int, width: int) -> None:
    size = copies * units
    numbers = list(range(units * width))
    held = [numbers[Shard(rank, size).part(len(numbers), units)] for rank in range(size)]
    assert held == [numbers[rank // copies * width :][:width] for rank in range(size)]
    assert all(Shard(rank, size).count(units) == 1 for rank in range(size))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (5, "num_attention_heads 12, no multiple of 5 and num_key_value_heads 3, neither"),
        (2, "num_key_value_heads 3, neither a multiple nor a divisor of 2"),
        (24, "num_attention_heads 12, no multiple of 24"),
    ],
)
def test_what_does_not_divide_is_named_with_what_would(size: int, says: str) -> None:
    with pytest.raises(StartupError) as refused:
        check_divides(CONFIG, Shard(0, size), Path("model"), has_own_family=True)
    line = str(refused.value)
    assert f"worldSize={size}: model/config.json has " in line and says in line
    assert line.endswith("allowed: 1, 3, 6, 12") and "\n" not in line


@pytest.mark.parametrize("size", [1, 3, 6, 12])
def test_what_divides_is_accepted(size: int) -> None:
    check_divides(CONFIG, Shard(0, size), Path("model"), has_own_family=True)


def test_a_model_of_transformers_stays_whole() -> None:
    check_divides(CONFIG, Shard(), Path("model"), has_own_family=False)
    with pytest.raises(StartupError, match="not divided; allowed: 1"):
        check_divides(CONFIG, Shard(0, 3), Path("model"), has_own_family=False)


def test_the_vocabulary_and_the_mlp_must_divide_too() -> None:
    for change in ({"vocab_size": 601}, {"intermediate_size": 121}):
        with pytest.raises(StartupError, match=f"{next(iter(change))} .*allowed: 1$"):
            check_divides(replace(CONFIG, **change), Shard(0, 3), Path("model"), has_own_family=True)  # type: ignore[arg-type]


# -- experts --

EXPERTS = ExpertsConfig(
    num_experts=12,
    per_token=2,
    intermediate_size=30,
    dense_layers=frozenset({0}),
    shared_intermediate_size=60,
)
SPARSE = replace(CONFIG, experts=EXPERTS)


@given(moe_ep=st.integers(1, 5), moe_tp=st.integers(1, 5), per_group=st.integers(1, 3))
def test_every_column_of_every_expert_is_on_one_rank(moe_ep: int, moe_tp: int, per_group: int) -> None:
    size, experts, columns = moe_ep * moe_tp, moe_ep * per_group, 2 * moe_tp
    held = [
        (expert, column)
        for rank in range(size)
        for shard in [Shard(rank, size, moe_ep)]
        for expert in range(experts)[shard.whole_experts.part(experts)]
        for column in range(columns)[shard.within_expert.part(columns)]
    ]
    assert sorted(held) == [(expert, column) for expert in range(experts) for column in range(columns)]


@pytest.mark.parametrize(("size", "moe_ep"), [(6, 1), (6, 2), (6, 3), (6, 6), (12, 12), (12, 4)])
def test_experts_are_dealt_or_divided(size: int, moe_ep: int) -> None:
    """Whole, they may be of a size that no rank has a part of."""
    check_divides(SPARSE, Shard(0, size, moe_ep), Path("model"), has_own_family=True)
    odd = replace(SPARSE, experts=replace(EXPERTS, intermediate_size=31))
    if size == moe_ep:
        check_divides(odd, Shard(0, size, moe_ep), Path("model"), has_own_family=True)
    else:
        with pytest.raises(
            StartupError, match=f"experts' intermediate_size 31, no multiple of {size // moe_ep}"
        ):
            check_divides(odd, Shard(0, size, moe_ep), Path("model"), has_own_family=True)


@pytest.mark.parametrize(
    ("config", "shard", "says"),
    [
        (CONFIG, Shard(0, 3, 3), "moe_ep=3: model/config.json has no experts; allowed: 1"),
        (
            replace(SPARSE, experts=replace(EXPERTS, num_experts=10)),
            Shard(0, 6, 3),
            "moe_ep=3: model/config.json has 10 experts, no multiple of 3; allowed: 1, 2",
        ),
        (
            replace(SPARSE, experts=replace(EXPERTS, shared_intermediate_size=63)),
            Shard(0, 6, 2),
            "worldSize=6: model/config.json has shared experts' intermediate_size 63, no multiple of 6",
        ),
        (SPARSE, Shard(0, 24, 2), "no multiple of 24 and experts' intermediate_size 30, no multiple of 12"),
    ],
)
def test_how_experts_cannot_be_dealt(config: DecoderConfig, shard: Shard, says: str) -> None:
    with pytest.raises(StartupError) as refused:
        check_divides(config, shard, Path("model"), has_own_family=True)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_without_dense_layers_their_width_does_not_matter() -> None:
    config = replace(SPARSE, intermediate_size=7, experts=replace(EXPERTS, dense_layers=frozenset()))
    check_divides(config, Shard(0, 6, 6), Path("model"), has_own_family=True)
    with pytest.raises(StartupError, match="has intermediate_size 7, no multiple of 6"):
        check_divides(
            replace(SPARSE, intermediate_size=7), Shard(0, 6, 6), Path("model"), has_own_family=True
        )
