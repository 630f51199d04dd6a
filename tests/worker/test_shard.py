"""Which rank holds what, and which models can be divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import StartupError
from worker.config_values import ConfigValues
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
        check_divides(CONFIG, size, Path("model"), has_own_family=True)
    line = str(refused.value)
    assert f"worldSize={size}: model/config.json has " in line and says in line
    assert line.endswith("allowed: 1, 3, 6, 12") and "\n" not in line


@pytest.mark.parametrize("size", [1, 3, 6, 12])
def test_what_divides_is_accepted(size: int) -> None:
    check_divides(CONFIG, size, Path("model"), has_own_family=True)


def test_a_model_of_transformers_stays_whole() -> None:
    check_divides(CONFIG, 1, Path("model"), has_own_family=False)
    with pytest.raises(StartupError, match="not divided; allowed: 1"):
        check_divides(CONFIG, 3, Path("model"), has_own_family=False)


def test_the_vocabulary_and_the_mlp_must_divide_too() -> None:
    for change in ({"vocab_size": 601}, {"intermediate_size": 121}):
        with pytest.raises(StartupError, match=f"{next(iter(change))} .*allowed: 1$"):
            check_divides(replace(CONFIG, **change), 3, Path("model"), has_own_family=True)  # type: ignore[arg-type]
