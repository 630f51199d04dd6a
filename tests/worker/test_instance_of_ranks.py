"""Whatever an instance does beside plain decoding, two ranks do as one: the same tokens, and it was done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jsonschema
from llguidance import LLMatcher

from engine.plan import StepKind
from engine.settings import LoraSettings, MixSettings
from tests.harness import TINY_MODEL
from tests.lora_adapters import write_adapter
from tests.worker.conftest import MODEL, SCHEDULE
from tests.worker.instance import Instance, on_instance

T = TypeVar("T")
Tokens = dict[tuple[int, int], list[int]]

TINY = replace(MODEL, weight_path=TINY_MODEL, dtype="float32")  # sums in another order decide nothing
LIMITS = replace(SCHEDULE, max_seq_len=256, max_input_len=255, max_iter_times=128)
PROMPTS = ("Once upon a time", "A dog and a cat met", "Tom has 3 apples and buys 4 more.", "Two birds")
ENOUGH = 128  # blocks


def ask_all(instance: Instance, max_tokens: int = 40) -> None:
    """Greedy, drawn, and drawn with the promise of equal bits."""
    for number, prompt in enumerate(PROMPTS):
        instance.ask(number, prompt, max_tokens, ignore_eos=True)
        instance.ask(number + 10, prompt, max_tokens, ignore_eos=True, temperature=0.8, seed=number)
    instance.ask(20, PROMPTS[0], max_tokens, temperature=0.9, seed=5, reproducible=True)


def same_on_two(scenario: Callable[[Instance], T], **settings: object) -> T:
    """What one rank and two give alike."""
    given = {"model": TINY, "schedule": LIMITS, "num_blocks": ENOUGH, **settings}
    one, two = (on_instance(size, scenario=scenario, **given) for size in (1, 2))  # type: ignore[arg-type]
    assert two == one
    return two


def test_branches_beams_and_what_is_known_of_a_prompt() -> None:
    def scenario(instance: Instance) -> Tokens:
        ask_all(instance, 12)
        instance.serve()
        instance.ask(30, " ".join(PROMPTS), temperature=1.0, seed=1, branches=2)
        instance.ask(31, " ".join(PROMPTS), branches=3, beam_search=True)
        instance.ask(32, " ".join(PROMPTS), prompt_logprobs=1)
        instance.serve()
        instance.ask(33, " ".join(PROMPTS))
        told = instance.serve()
        assert any(plan.copies for plan in instance.plans)
        assert instance.scheduler.num_prefix_hits > 0
        return told

    told = same_on_two(scenario, schedule=replace(LIMITS, prefix_cache=True, max_n=3))
    assert told[30, 0] != told[30, 1] and {(31, 0), (31, 1), (31, 2)} <= told.keys()


def test_requests_are_swapped_out_and_in() -> None:
    def scenario(instance: Instance) -> Tokens:
        ask_all(instance)
        told = instance.serve()
        assert sum(len(plan.swap_in) for plan in instance.plans) > 10
        return told

    limits = replace(LIMITS, max_preempt_count=2)
    same_on_two(scenario, model=replace(TINY, cpu_mem_gib=1), schedule=limits, num_blocks=20)


def test_guesses_are_checked_by_all_ranks() -> None:
    line = "Tom has 3 apples and buys 4 more. "

    def scenario(instance: Instance) -> Tokens:
        for number, more in enumerate(({}, {"temperature": 0.7, "seed": 7}, {"frequency_penalty": 0.3})):
            instance.ask(number, line * 4, 60, ignore_eos=True, **more)
        told = instance.serve()
        guessed = instance.scheduler.speculation
        assert guessed is not None and 0 < guessed.num_right <= guessed.num_guessed
        assert any(plan.num_guessed for plan in instance.plans)
        return told

    same_on_two(scenario, schedule=replace(LIMITS, guess_length=8))


def test_prompts_in_pieces_beside_rows_that_decode() -> None:
    def scenario(instance: Instance) -> Tokens:
        ask_all(instance)
        for _ in range(4):
            instance.turn()
        instance.ask(40, " ".join(PROMPTS * 3), ignore_eos=True)
        told = instance.serve()
        assert any(plan.kind is StepKind.MIXED for plan in instance.plans)
        return told

    mix = MixSettings(chunk_size=16, max_partial=4, long_threshold=1024, max_long_partial=4)
    same_on_two(scenario, schedule=replace(LIMITS, mix=mix))


def test_adapters_come_and_go_between_steps(tmp_path: Path) -> None:
    """Under one name another one, then none: no rank keeps what has gone."""
    for seed, name in enumerate(("first", "second")):
        write_adapter(TINY_MODEL, tmp_path / name, rank=4, strength=0.7, seed=seed)

    def scenario(instance: Instance) -> Tokens:
        ask_all(instance, 60)
        for _ in range(3):
            instance.turn()
        instance.load_adapter("guest", str(tmp_path / "first"))
        instance.ask(50, PROMPTS[0], lora="guest", ignore_eos=True)
        instance.turn()
        assert instance.scheduler.running  # others beside it
        instance.unload_adapter("guest")
        instance.load_adapter("guest", str(tmp_path / "second"))
        instance.ask(51, PROMPTS[0], lora="guest", ignore_eos=True)
        instance.ask(52, PROMPTS[0], ignore_eos=True)
        instance.load_adapter("other", str(tmp_path / "first"))
        instance.unload_adapter("guest")
        instance.ask(53, PROMPTS[0])
        return instance.serve()

    lora = LoraSettings(max_loras=2, max_rank=8)
    told = same_on_two(scenario, model=replace(TINY, lora=lora))
    assert len({tuple(told[request, 0]) for request in (50, 51, 52)}) == 3


def test_answers_follow_their_grammars() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"enum": [1, 20, 300]}},
        "required": ["name", "age"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    pattern = "[a-f]{3}-(yes|no)!"

    def scenario(instance: Instance) -> tuple[Tokens, list[str]]:
        ask_all(instance)
        of_schema = LLMatcher.grammar_from_json_schema(schema)
        instance.ask(60, PROMPTS[0], 100, grammar=of_schema)
        instance.ask(61, PROMPTS[1], 100, grammar=LLMatcher.grammar_from_regex(pattern), temperature=1.0)
        return instance.serve(), [instance.text(60), instance.text(61)]

    _, (of_schema, of_pattern) = same_on_two(scenario)
    jsonschema.validate(json.loads(of_schema), schema)
    assert re.fullmatch(pattern, of_pattern)
