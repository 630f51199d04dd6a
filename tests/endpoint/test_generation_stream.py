"""What the choices of one request share, and what is measured of each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

import endpoint.detokenizer
from endpoint.engine_client import EngineClient
from endpoint.flights import Flight, Token
from endpoint.generation_stream import GenerationStream
from endpoint.metrics import Metrics
from endpoint.protocols.base import Completion, GenerationRequest
from endpoint.tokenizer import TokenizerPool
from engine.outcome import FinishCode
from engine.sampling_params import SamplingParams
from tests.endpoint import tiny_tokenizers
from tests.endpoint.samples import context

CHOICES = 3
SUBMITTED = 1.0


class Engine:
    """Needs nothing to be told."""

    def end_branch(self, flight: Flight, branch: int) -> None: ...

    def close(self, flight: Flight) -> None: ...


@pytest.fixture
def tokenizer(tmp_path: Path) -> TokenizerPool:
    return TokenizerPool(tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path), threads=1)


def answers(
    tokenizer: TokenizerPool, text: str, metrics: Metrics, stop: Sequence[str] = ()
) -> list[Completion]:
    """Every choice writes `text`: the tokens of choice 0 come at 2.0, those of choice 1 at 3.0, ..."""
    flight = Flight(CHOICES, 0.0, SUBMITTED, SUBMITTED, math.inf)
    ids = tokenizer.encode_bare(text)
    for choice in range(CHOICES):
        for number, token_id in enumerate(ids, 1):
            finish = FinishCode.LENGTH if number == len(ids) else FinishCode.NONE
            flight.push(Token(choice, token_id, finish, 1, 0, 2.0 + choice, 0.0, ()))
    request = GenerationRequest(
        "", SamplingParams(8, branches=CHOICES), stream=False, n=CHOICES, stop=tuple(stop)
    )
    engine = cast(EngineClient, Engine())
    stream = GenerationStream(engine, flight, tokenizer, request, [(1,)], context(), metrics, None)
    return asyncio.run(stream.collect())


def test_choices_share_the_automaton_of_their_stop_strings(
    tokenizer: TokenizerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Sequence[str]] = []
    add = endpoint.detokenizer.StopStrings._add

    def counted(self: endpoint.detokenizer.StopStrings, string: str) -> None:
        made.append(string)
        add(self, string)

    monkeypatch.setattr(endpoint.detokenizer.StopStrings, "_add", counted)
    found = answers(tokenizer, "one two END three", Metrics("m", 10, list), stop=["END", "never"])
    assert [completion.text for completion in found] == ["one two "] * CHOICES
    assert made == ["END", "never"]


def test_the_first_token_of_a_choice_is_no_gap_between_two(tokenizer: TokenizerPool) -> None:
    metrics = Metrics("m", 10, list)
    answers(tokenizer, "ab cd", metrics)
    num_tokens = len(tokenizer.encode_bare("ab cd"))
    told = dict(line.rsplit(" ", 1) for line in metrics.exposition().decode().splitlines() if line[:1] != "#")

    def value(name: str) -> float:
        return float(told[f'{name}{{model_name="m"}}'])

    assert value("generation_tokens_total") == CHOICES * num_tokens
    assert value("time_to_first_token_seconds_count") == value("time_to_first_token_seconds_sum") == 1.0
    assert value("time_per_output_token_seconds_count") == CHOICES * (num_tokens - 1)
    assert value("time_per_output_token_seconds_sum") == 0.0
