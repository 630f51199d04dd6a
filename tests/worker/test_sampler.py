"""The sampler against exact distributions and straightforward references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.sampler import NO_TOKEN, Sampler, penalize, uniform

SAMPLED = SamplingParams(max_tokens=64, temperature=1.0)


def sequence(
    params: SamplingParams, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = ()
) -> Sequence:
    made = Sequence(0, np.array(prompt, np.int32), params)
    for token in output:
        made.append(token)
    return made


def exact_distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities by the definition: one full stable sort, no shortcuts."""
    probabilities = (logits.double() / params.temperature).softmax(-1).numpy()
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: params.top_k or len(order)]
    share = probabilities[kept] / probabilities[kept].sum()
    kept = kept[np.cumsum(share) - share < params.top_p]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def frequencies(logits: torch.Tensor, params: SamplingParams, draws: int) -> np.ndarray:
    rows = [sequence(replace(params, seed=seed)) for seed in range(draws)]
    tokens = Sampler(len(logits)).sample(logits.expand(draws, -1), rows)
    return np.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    "params",
    [
        SAMPLED,
        replace(SAMPLED, temperature=0.6),
        replace(SAMPLED, temperature=3.0),
        replace(SAMPLED, top_k=5),
        replace(SAMPLED, top_p=0.8),
        replace(SAMPLED, temperature=1.5, top_k=7, top_p=0.7),
        replace(SAMPLED, top_k=1000, top_p=0.5),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "all", "top_k beyond the vocabulary"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_follow_the_exact_distribution(params: SamplingParams, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(30).mul(2).to(dtype)
    want = exact_distribution(logits, params)
    draws = 8000
    got = frequencies(logits, params, draws)
    assert got[want == 0].sum() == 0
    live = want > 0
    chi_square = (draws * (got[live] - want[live]) ** 2 / want[live]).sum()
    # mean of a chi-square is its degrees of freedom n, its deviation sqrt(2n); seeds are fixed
    degrees = max(1, live.sum() - 1)
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
)
def test_only_tokens_left_by_the_filters_are_drawn(
    logits: list[float], top_k: int, top_p: float, seeds: list[int]
) -> None:
    """Few distinct logits, so that nearly every cut runs through equals."""
    row = torch.tensor(logits)
    params = replace(SAMPLED, top_k=top_k, top_p=top_p)
    # one part in a million: at the very edge of top_p rounding decides, in either implementation
    allowed = sum(
        exact_distribution(row, replace(params, top_p=min(1.0, top_p * f))) for f in (1 - 1e-6, 1, 1 + 1e-6)
    )
    rows = [sequence(replace(params, seed=seed)) for seed in seeds]
    tokens = Sampler(len(row)).sample(row.expand(len(rows), -1), rows)
    assert (allowed[tokens] > 0).all()


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    """5000 nearly equal tokens: 99 % of the mass needs far more than the part sorted first."""
    torch.manual_seed(2)
    logits = torch.randn(5000) * 0.01
    params = replace(SAMPLED, top_p=0.99)
    allowed = exact_distribution(logits, params) > 0
    rows = [sequence(replace(params, seed=seed)) for seed in range(2000)]
    tokens = Sampler(5000).sample(logits.expand(2000, -1), rows)
    assert allowed[tokens].all()
    assert len(set(tokens.tolist())) > 1400


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    torch.manual_seed(3)
    logits = torch.randn(40, 300)
    params = [
        replace(
            SAMPLED,
            temperature=[0.0, 0.5, 1.0, 2.0][i % 4],
            top_k=[0, 3, 50][i % 3],
            top_p=[1.0, 0.9][i % 2],
            repetition_penalty=[1.0, 1.2][i % 5 == 0],
            seed=i // 2,
        )
        for i in range(40)
    ]
    rows = [sequence(p, prompt=(1, 2), output=tuple(range(i % 4))) for i, p in enumerate(params)]
    sampler = Sampler(300)
    together = sampler.sample(logits, rows)
    alone = [int(sampler.sample(logits[i : i + 1], rows[i : i + 1])[0]) for i in range(40)]
    backwards = sampler.sample(logits.flip(0), rows[::-1])[::-1]
    assert together.tolist() == alone == backwards.tolist()


def test_seed_and_position_both_change_the_draw() -> None:
    position = np.arange(1000, dtype=np.uint64)
    same_seed = uniform(np.zeros(1000, np.uint64), position)
    same_position = uniform(position, np.zeros(1000, np.uint64))
    for values in (same_seed, same_position):
        assert ((values >= 0) & (values < 1)).all()
        assert len(np.unique(values)) == 1000
        counts = np.histogram(values, bins=10, range=(0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 9 + 5 * np.sqrt(18)  # chi-square, 9 degrees of freedom
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.15


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    greedy = sequence(SamplingParams(max_tokens=1, top_k=2, top_p=0.1, seed=9))
    assert Sampler(3).sample(logits, [greedy, greedy]).tolist() == [1, 0]


def test_a_tiny_temperature_and_a_huge_one_stay_numbers() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, float("-inf")]])
    cold = replace(SAMPLED, temperature=1e-300)
    assert {int(Sampler(4).sample(logits, [sequence(replace(cold, seed=s))])[0]) for s in range(20)} == {1}
    hot = replace(SAMPLED, temperature=1e30)
    assert {int(Sampler(4).sample(logits, [sequence(replace(hot, seed=s))])[0]) for s in range(50)} == {
        0,
        1,
        2,
    }


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=12),
    output=st.lists(st.integers(0, 19), max_size=12),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    seed=st.integers(0, 1000),
)
def test_penalties_equal_a_token_by_token_reference(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(20) * 2
    params = SamplingParams(
        max_tokens=64, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    want = logits.double().numpy().copy()
    for token in range(20):
        if token in prompt or token in output:
            want[token] = want[token] / repetition if want[token] > 0 else want[token] * repetition
        if token in output:
            want[token] -= presence + frequency * output.count(token)
    row = sequence(params, tuple(prompt), tuple(output))
    before = logits.clone()
    token = int(Sampler(20).sample(logits[None], [row])[0])
    assert want[token] >= want.max() - 1e-5  # float32 against float64
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params", [SamplingParams(max_tokens=1), SAMPLED, replace(SAMPLED, top_k=2, top_p=0.5)]
)
def test_a_row_of_no_numbers_gets_no_token_and_harms_nobody(bad: float, params: SamplingParams) -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 50)
    rows = [sequence(replace(params, seed=seed)) for seed in range(3)]
    healthy = Sampler(50).sample(logits, rows)
    logits[1, 33] = bad
    tokens = Sampler(50).sample(logits, rows)
    assert tokens.tolist() == [healthy[0], NO_TOKEN, healthy[2]]
    assert tokens.dtype == np.int32


def test_a_row_of_minus_infinity_gets_no_token() -> None:
    assert Sampler(4).sample(torch.full((1, 4), float("-inf")), [sequence(SAMPLED)]).tolist() == [NO_TOKEN]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-39, 1e39, 1e308])
@pytest.mark.parametrize("params", [SamplingParams(max_tokens=4), SAMPLED, replace(SAMPLED, top_k=3)])
@pytest.mark.parametrize("others", [0.0, 1e39, -1e300])
def test_no_legal_penalty_turns_a_logit_into_no_number(
    penalty: float, params: SamplingParams, others: float
) -> None:
    logits = torch.tensor([[0.0, 3.0, -3.0, 1.0, float("-inf"), 2.0]])
    extreme = replace(
        params, repetition_penalty=penalty, presence_penalty=others, frequency_penalty=others, seed=3
    )
    row = sequence(extreme, prompt=(0, 1, 2, 4), output=(1, 2, 2, 4))
    (token,) = Sampler(6).sample(logits, [row])
    assert token in (0, 1, 2, 3, 5)  # never the masked one
    if params.greedy and others == 0.0:
        assert token == (1 if penalty < 1 else 5 if penalty > 1e38 else None)


def test_penalized_logits_are_clipped_to_finite_numbers() -> None:
    params = SamplingParams(max_tokens=1, repetition_penalty=1e-39)
    logits = np.array([0.0, 3.0, -3.0, -np.inf], np.float32)
    penalize(logits, sequence(params, prompt=(0, 1, 3)))
    assert logits.tolist() == [0.0, float(np.finfo(np.float32).max), -3.0, -np.inf]
    logits = np.array([-3.0, 0.0], np.float32)
    penalize(logits, sequence(replace(params, repetition_penalty=1e39), prompt=(0, 1)))
    assert logits.tolist() == [float(np.finfo(np.float32).min), 0.0]


def test_min_p_drops_what_is_much_less_likely_than_the_best() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    seen = set()
    for seed in range(300):
        params = SamplingParams(4, temperature=1.0, seed=seed, min_p=0.5)
        seen.add(int(Sampler(4).sample(logits, [Sequence(1, np.array([0], np.int32), params)])[0]))
    assert seen == {0, 1}


def test_bias_is_added_before_the_choice_and_greedy_honours_it() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    params = SamplingParams(4, logit_bias=((1, -5.0), (0, 0.5)))
    assert Sampler(3).sample(logits, [Sequence(1, np.array([0], np.int32), params)]).tolist() == [2]
    assert logits.tolist() == [[1.0, 3.0, 2.0]]


def test_ends_are_masked_until_min_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 1.0]])
    sequence = Sequence(1, np.array([2], np.int32), SamplingParams(4, min_tokens=1, stop_token_ids=(1,)))
    sampler = Sampler(3, eos_token_ids=[0])
    assert sampler.sample(logits, [sequence]).tolist() == [2]
    sequence.append(2)
    assert sampler.sample(logits, [sequence]).tolist() == [0]
