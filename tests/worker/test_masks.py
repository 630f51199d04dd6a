"""The processes that compute masks: what happens to one answer there is that answer's own affair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from llguidance import LLMatcher

from engine.executor import NO_CONTINUATION, NOT_YET
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.title import PROCESS_NAME
from tests.harness import REPO, TINY_MODEL, Children, eventually
from worker.grammar import GrammarBook
from worker.masks.client import MaskClient
from worker.masks.keeper import Vocabulary
from worker.sampler import Sampler

VOCAB, EOS = 2048, [2, 0]
LENGTH = 24
ANY_OBJECT = json.dumps({"grammars": [{"json_schema": {"type": "object"}}]})
# minutes of compiling, and seconds of one mask in the middle of an answer; no endpoint would let them pass
ENDLESS_COMPILE = json.dumps({"grammars": [{"json_schema": {"type": "integer", "multipleOf": 9_999_991}}]})
ENDLESS_MASK = LLMatcher.grammar_from_regex("(((x{100}){100}){100}){100}")

Step = Callable[[list[Sequence]], None]


@pytest.fixture
def masks() -> Iterator[MaskClient]:
    client = MaskClient(Vocabulary(TINY_MODEL, False, VOCAB, EOS), slots=16)
    yield client
    client.close()


@pytest.fixture(scope="module")
def undisturbed() -> list[list[int]]:
    client = MaskClient(Vocabulary(TINY_MODEL, False, VOCAB, EOS), slots=16)
    try:
        rows = [answer(ANY_OBJECT, seed) for seed in range(3)]
        run(client, rows)
        return outputs(rows)
    finally:
        client.close()


def answer(grammar: str, seed: int = 0, length: int = LENGTH) -> Sequence:
    params = SamplingParams(max_tokens=length, temperature=1.0, seed=seed, grammar=grammar, ignore_eos=True)
    return Sequence(seed, np.zeros(1, np.int32), params)


def outputs(rows: list[Sequence]) -> list[list[int]]:
    return [row.output_ids.tolist() for row in rows]


def run(client: MaskClient, rows: list[Sequence], between: Step = lambda rows: None) -> dict[int, int]:
    """Write all answers to their end, step by step: seed -> tokens before the error, for those with one."""
    sampler = Sampler(VOCAB, EOS, GrammarBook(client))
    live, failed = list(rows), dict[int, int]()
    while live:
        between(rows)
        sampler.expect(live)
        tokens = sampler.sample(torch.zeros(len(live), VOCAB), live)
        for row, token in zip(list(live), tokens.tolist(), strict=True):
            if token == NO_CONTINUATION:
                failed[row.params.seed] = row.num_output
                live.remove(row)
            elif token != NOT_YET:
                row.append(token)
                if row.num_output == row.params.max_tokens:
                    live.remove(row)
    return failed


@pytest.fixture
def processes(children: Children) -> Children:
    """The keeper and its lane, as far as they are there."""

    def alive() -> list[psutil.Process]:
        found = []
        for process in children(recursive=True):
            if process.name().startswith(PROCESS_NAME[:15]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    return alive


def test_nothing_is_started_for_answers_without_grammar(masks: MaskClient, processes: Children) -> None:
    run(masks, [answer("")])
    assert not processes()
    run(masks, [answer(ANY_OBJECT)])
    assert len(processes()) == 2
    masks.close()
    eventually(lambda: not processes(), 5.0, "both have ended")


@pytest.mark.parametrize("hostile", [ENDLESS_COMPILE, ENDLESS_MASK])
def test_A11_a_grammar_that_takes_too_much_ends_alone(
    masks: MaskClient, undisturbed: list[list[int]], hostile: str, processes: Children
) -> None:
    rows = [answer(ANY_OBJECT, seed) for seed in range(3)]
    failed = run(masks, [answer(hostile, 7), *rows])
    assert list(failed) == [7] and outputs(rows) == undisturbed
    lanes = processes()
    assert list(run(masks, [answer(hostile, 8)])) == [8]
    assert processes() == lanes, "it was remembered, and ended nothing"


@pytest.mark.parametrize("which", ["keeper", "lane", "both"])
def test_processes_that_are_killed_are_replaced_and_no_answer_is_lost(
    masks: MaskClient, undisturbed: list[list[int]], which: str, children: Children
) -> None:
    rows = [answer(ANY_OBJECT, seed) for seed in range(3)]
    kills = []

    def kill(rows: list[Sequence]) -> None:
        if rows[1].num_output in (5, 6, 15) and rows[1].num_output not in kills:
            kills.append(rows[1].num_output)
            (keeper,) = children()
            victims = {"keeper": [keeper], "lane": keeper.children()}
            for victim in victims.get(which, [keeper, *keeper.children()]):
                victim.kill()

    assert run(masks, rows, kill) == {} and kills == [5, 6, 15]
    assert outputs(rows) == undisturbed


def test_a_stopped_lane_does_not_stop_the_others(
    masks: MaskClient, undisturbed: list[list[int]], monkeypatch: pytest.MonkeyPatch, processes: Children
) -> None:
    monkeypatch.setattr("worker.masks.client._SILENT_S", 0.5)
    run(masks, [answer(ANY_OBJECT, length=1)])  # else the free one is through before the lane is there
    bound, free = answer(ANY_OBJECT, 0), answer("", 1, length=400)
    stopped: list[psutil.Process] = []
    ahead: list[int] = []

    def stop(rows: list[Sequence]) -> None:
        if bound.num_output == 3:
            if not stopped:
                stopped.append(processes()[-1])
                stopped[0].suspend()
            ahead.append(free.num_output)

    assert run(masks, [bound, free], stop) == {}
    assert outputs([bound]) == undisturbed[:1]
    assert ahead[-1] > ahead[0], "the free one went on meanwhile"
    assert not stopped[0].is_running()


def test_answers_without_a_slot_wait_for_one(undisturbed: list[list[int]]) -> None:
    client = MaskClient(Vocabulary(TINY_MODEL, False, VOCAB, EOS), slots=2)
    try:
        rows = [answer(ANY_OBJECT, seed) for seed in range(3)]

        def let_go(rows: list[Sequence]) -> None:
            for row in rows:
                if row.num_output == LENGTH:
                    row.progress = None  # as when the sequence itself is gone

        assert run(client, rows, let_go) == {} and outputs(rows) == undisturbed
    finally:
        client.close()


def test_a_tokenizer_that_cannot_be_used_ends_the_request_only(tmp_path: Path, processes: Children) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    client = MaskClient(Vocabulary(tmp_path, False, VOCAB, EOS), slots=16)
    free = answer("", 1)
    assert run(client, [answer(ANY_OBJECT, 0), free]) == {0: 0}
    assert free.num_output == LENGTH and not processes()


def test_A12_compiled_grammars_beyond_the_cache_are_forgotten_and_made_again(masks: MaskClient) -> None:
    small = MaskClient(masks.vocabulary, slots=16, cache_bytes=600 << 10)
    try:
        for _ in range(2):
            for text in ("ab", "cd", "ef", "gh"):
                row = answer(LLMatcher.grammar_from_regex(text))
                assert run(small, [row]) == {}
                assert set(row.output_ids.tolist()[-2:]) <= set(EOS)
        assert len(small._known) == 2
    finally:
        small.close()


def test_the_processes_end_with_the_worker() -> None:
    """Even a worker that had no time for anything takes them along."""
    script = (
        "import sys, time; from pathlib import Path; from worker.masks.client import MaskClient, State\n"
        "from worker.masks.keeper import Vocabulary; import numpy as np\n"
        f"masks = MaskClient(Vocabulary(Path({str(TINY_MODEL)!r}), False, {VOCAB}, {EOS}), 16)\n"
        f"trail = masks.begin({ENDLESS_COMPILE!r}); masks.ask(trail, np.empty(0, np.int32)); masks.push()\n"
        "while not masks._greeted: masks.wait([trail], 0.1)\n"
        "print(flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], cwd=REPO, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    with worker, worker.stdout:
        worker.stdout.readline()
        helpers = psutil.Process(worker.pid).children(recursive=True)
        assert len(helpers) == 2
        os.kill(worker.pid, signal.SIGKILL)
    eventually(lambda: not any(map(psutil.Process.is_running, helpers)), 5.0, "they have ended too")
