"""The worker without weights: what it echoes, what it counts, and that it stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_manager import BlockManager
from engine.errors import StartupError
from engine.outcome import FinishCode, Outcome
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from engine.settings import ModelSettings, ScheduleSettings
from tests.harness import TINY_MODEL
from worker.mock import EchoExecutor, count_mock_blocks, read_vocabulary

REPO = Path(__file__).resolve().parents[2]
VOCAB = 50
EOS = 49
SCHEDULE = ScheduleSettings(
    block_size=16,
    max_prefill_batch_size=8,
    max_prefill_tokens=512,
    max_batch_size=8,
    max_iter_times=512,
    max_queue_delay_us=0,
    max_first_token_wait_ms=2500,
    max_n=8,
    max_seq_len=512,
    max_input_len=511,
    truncation="off",
)


def generate(prompts: list[list[int]], **params: object) -> list[list[Outcome]]:
    """Every prompt through a scheduler to its end: the outcomes of each, branch after branch."""
    scheduler = Scheduler(SCHEDULE, BlockManager(256, SCHEDULE.block_size), (EOS,))
    executor = EchoExecutor(VOCAB, num_eos=1)
    wanted = SamplingParams(**params)  # type: ignore[arg-type]
    for number, prompt in enumerate(prompts):
        scheduler.add(SequenceGroup(number, np.array(prompt, np.int32), wanted))
    found: list[list[Outcome]] = [[] for _ in prompts]
    while scheduler.has_work:
        plan = scheduler.schedule(1.0)
        assert plan is not None
        for outcome in scheduler.commit(plan, executor.run(plan), 1.0):
            found[outcome.request_id].append(outcome)
    return [sorted(outcomes, key=lambda outcome: outcome.branch) for outcomes in found]


def tokens(outcomes: list[Outcome]) -> list[int]:
    return [outcome.token for outcome in outcomes]


ids = st.integers(0, EOS - 1)


@given(st.lists(st.lists(ids, min_size=1, max_size=40), min_size=1, max_size=5), st.integers(1, 90))
def test_an_answer_is_its_prompt_over_and_over(prompts: list[list[int]], length: int) -> None:
    for prompt, outcomes in zip(prompts, generate(prompts, max_tokens=length), strict=True):
        assert tokens(outcomes) == [prompt[i % len(prompt)] for i in range(length)]
        assert [outcome.finish for outcome in outcomes[:-1]] == [FinishCode.NONE] * (length - 1)
        assert outcomes[-1].finish is FinishCode.LENGTH


def test_no_sampling_parameter_changes_it() -> None:
    wild = {"temperature": 2.0, "top_k": 1, "seed": 7, "presence_penalty": 2.0, "logit_bias": ((3, 100.0),)}
    (outcomes,) = generate([[5, 6]], max_tokens=5, branches=2, **wild)
    assert tokens(outcomes) == [5, 6, 5, 6, 5] * 2


def test_what_the_scheduler_decides_stays_in_force() -> None:
    prompt = [1, EOS, 2]
    (outcomes,) = generate([prompt], max_tokens=9)
    assert (tokens(outcomes), outcomes[-1].finish) == ([1, EOS], FinishCode.EOS)
    (outcomes,) = generate([prompt], max_tokens=9, ignore_eos=True)
    assert (tokens(outcomes), outcomes[-1].finish) == (prompt * 3, FinishCode.LENGTH)
    (outcomes,) = generate([prompt], max_tokens=9, ignore_eos=True, stop_token_ids=(2,))
    assert (tokens(outcomes), outcomes[-1].finish) == (prompt, FinishCode.STOP_TOKEN)


def test_log_probabilities_are_those_of_a_certain_model() -> None:
    plain, wanted = ([1, VOCAB - 2], {"max_tokens": 2})
    (outcomes,) = generate([plain], **wanted)
    assert all(not outcome.top for outcome in outcomes)
    (outcomes,) = generate([plain], logprobs=3, **wanted)
    for outcome in outcomes:
        assert outcome.logprob == 0.0
        assert outcome.top[0] == (outcome.token, 0.0)
        assert len({token for token, _ in outcome.top}) == 3
        assert all(0 <= token < VOCAB and value < -10 for token, value in outcome.top[1:])
    (outcomes,) = generate([plain], logprobs=VOCAB + 5, **wanted)
    assert all({token for token, _ in outcome.top} == set(range(VOCAB)) for outcome in outcomes)


def test_prompts_are_as_certain() -> None:
    scheduler = Scheduler(SCHEDULE, BlockManager(256, SCHEDULE.block_size), (EOS,))
    for number, wanted in enumerate((-1, 0, 2)):
        params = SamplingParams(max_tokens=2, prompt_logprobs=wanted)
        scheduler.add(SequenceGroup(number, np.array([4, 5, 6], np.int32), params))
    executor = EchoExecutor(VOCAB, num_eos=1)
    found = []
    while scheduler.has_work:
        plan = scheduler.schedule(1.0)
        assert plan is not None
        sampled = executor.run(plan)
        found.append(dict(sampled.prompts))
        scheduler.commit(plan, sampled, 1.0)
    assert [sorted(prompts) for prompts in found] == [[1, 2], []]
    scores = found[0][2]
    assert scores.tokens.tolist() == [5, 6]
    assert scores.logprobs.tolist() == [0.0, 0.0] and scores.ranks.tolist() == [1, 1]
    assert scores.other_ids.shape == scores.other_logprobs.shape == (2, 2)
    assert found[0][1].other_ids.shape == (2, 0)


def test_the_best_beam_is_the_echo() -> None:
    (outcomes,) = generate([[4, 5, 6]], max_tokens=5, branches=3, beam_search=True)
    answers = [tokens([o for o in outcomes if o.branch == branch]) for branch in range(3)]
    assert answers[0] == [4, 5, 6, 4, 5]
    assert len({tuple(answer) for answer in answers}) == 3


# --- what it reads -------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_models(tmp_path: Path) -> None:
    assert read_vocabulary(TINY_MODEL) == (2048, (2, 0))
    assert read_vocabulary(tmp_path) == (256, ())
    document = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 6}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert read_vocabulary(tmp_path) == (7, ())
    (tmp_path / "config.json").write_text('{"padded_vocab_size": 9, "eos_token_id": [3, 4]}')
    assert read_vocabulary(tmp_path) == (9, (3, 4))


@pytest.mark.parametrize("size", ["-5", "0", "1.5", '"many"', "[]"])
@pytest.mark.parametrize("key", ["vocab_size", "padded_vocab_size"])
def test_a_vocabulary_of_no_size_is_refused(tmp_path: Path, key: str, size: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"{key}": {size}}}')
    with pytest.raises(StartupError, match=f"config.json: {key} must be an integer in"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {}}', '{"model": {"vocab": 1}}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(StartupError, match=r"tokenizer\.json: is no usable tokenizer"):
        read_vocabulary(tmp_path)


def model(blocks: int) -> ModelSettings:
    return ModelSettings(
        name="m",
        weight_path=Path(),
        instance_type="StandardMock",
        device_type="auto",
        dtype="auto",
        kv_cache_gib=-1,
        kv_cache_mib=0,
        kv_block_num=blocks,
        memory_fraction=0.8,
        cpu_threads=0,
        trust_remote_code=False,
        ignore_eos=False,
        world_size=1,
        cpu_mem_gib=0,
    )


def test_blocks_are_counted_like_a_cache() -> None:
    per_sequence = SCHEDULE.max_seq_len // SCHEDULE.block_size
    assert count_mock_blocks(model(0), SCHEDULE) == SCHEDULE.max_batch_size * per_sequence
    assert count_mock_blocks(model(per_sequence), SCHEDULE) == per_sequence
    with pytest.raises(StartupError, match="kvCacheBlockNum is 31"):
        count_mock_blocks(model(per_sequence - 1), SCHEDULE)


def test_it_loads_no_torch() -> None:
    script = (
        "import sys, worker.mock; print(sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"
