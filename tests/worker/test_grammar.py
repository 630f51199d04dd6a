"""Grammars in the sampler: against brute force, over preemption, in branches, and with all else beside."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.executor import NO_CONTINUATION, NOT_YET
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from worker.grammar import GrammarBook, NotYet
from worker.masks.client import MaskClient
from worker.masks.keeper import Vocabulary
from worker.sampler import Sampler

WORDS = ["a", "b", "c", "ab", "bc", "abc", "aa", "1", "2", "12", '"', "{", "}", ":"]
EOS = [len(WORDS), len(WORDS) + 1]
THINK_END = len(WORDS) + 2
TOKENIZER_SIZE = len(WORDS) + 3
VOCAB = TOKENIZER_SIZE + 6  # as models are padded
PARAMS = SamplingParams(max_tokens=64, temperature=1.0)


@pytest.fixture(scope="module", autouse=True)
def masks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MaskClient]:
    """The processes that every book of this module asks; started with the first grammar."""
    model = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<end>", "</think>"])
    tokenizer.save(str(model / "tokenizer.json"))
    SHARED.append(MaskClient(Vocabulary(model, False, VOCAB, EOS), slots=64))
    yield SHARED[0]
    SHARED.pop().close()


SHARED: list[MaskClient] = []


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def book() -> GrammarBook:
    return GrammarBook(SHARED[0])


def sequence(params: SamplingParams, output: tuple[int, ...] = (), branch: int = 0) -> Sequence:
    made = Sequence(0, np.zeros(1, np.int32), params, branch=branch)
    for token in output:
        made.append(token)
    return made


def ids(*words: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in words)


def legal(of: GrammarBook, seq: Sequence) -> object:
    """What the book says as soon as it knows."""
    while True:
        of.collect([seq], alone=True)
        with contextlib.suppress(NotYet):
            return of.legal(seq)


def legal_ids(of: GrammarBook, seq: Sequence) -> set[int]:
    mask = legal(of, seq)
    assert isinstance(mask, np.ndarray) and mask.shape == (VOCAB,)
    return set(np.flatnonzero(mask).tolist())


# every text of the language, so that a prefix can be looked up
LANGUAGES = {
    "abc|abab|b1": {"abc", "abab", "b1"},
    "(ab){1,3}c?": {"ab" * n + c for n in (1, 2, 3) for c in ("", "c")},
    "[ab]{0,3}12": {"".join(p) + "12" for n in range(4) for p in product("ab", repeat=n)},
}  # fmt: skip


@pytest.mark.parametrize("pattern", LANGUAGES)
def test_masks_are_what_brute_force_finds(pattern: str) -> None:
    texts = LANGUAGES[pattern]
    params = replace(PARAMS, grammar=regex(pattern))
    of = book()
    states = [()]
    for _ in range(40):
        if not states:
            break
        output: tuple[int, ...] = states.pop()
        so_far = "".join(WORDS[token] for token in output)
        goes_on = {
            token for token, word in enumerate(WORDS) if any(text.startswith(so_far + word) for text in texts)
        }
        found = legal_ids(of, sequence(params, output))
        possible = goes_on | (set(EOS) if so_far in texts else set())
        forced = {text[len(so_far) :][:1] for text in texts if text.startswith(so_far)}
        if len(forced) == 1:  # of several ways to write what must come, the tokenizer's own is enough
            assert found and found <= possible
        else:
            assert found == possible
        states += [(*output, token) for token in goes_on]


def sample_all(of: GrammarBook, rows: list[Sequence], logits: torch.Tensor) -> list[int]:
    """The next token of each row, as soon as every grammar knows."""
    sampler = Sampler(VOCAB, EOS, of)
    while NOT_YET in (tokens := sampler.sample(logits, rows)):
        pass
    return [int(token) for token in tokens]


def sample(of: GrammarBook, seq: Sequence, logits: torch.Tensor | None = None) -> int:
    return sample_all(of, [seq], torch.zeros(1, VOCAB) if logits is None else logits[None])[0]


def generated(of: GrammarBook, params: SamplingParams, branch: int = 0) -> list[int]:
    """Tokens of a model to which everything is alike, until EOS or max_tokens."""
    seq = sequence(params, branch=branch)
    while seq.num_output < params.max_tokens:
        token = sample(of, seq)
        if token < 0:
            return [*seq.output_ids.tolist(), token]
        seq.append(token)
        if token in EOS and not params.ignore_eos:
            break
    return seq.output_ids.tolist()


def text_of(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens if token < len(WORDS))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_bias_and_penalties_cannot_leave_the_grammar(seed: int, greedy: bool) -> None:
    params = replace(
        PARAMS,
        grammar=regex("(ab|c1){3}"),
        seed=seed,
        temperature=0.0 if greedy else 1.5,
        logit_bias=((WORDS.index("b"), -100.0), (WORDS.index("}"), 100.0)),
        frequency_penalty=2.0,
        repetition_penalty=2.0,
        top_p=0.1,
    )
    tokens = generated(book(), params)
    assert re.fullmatch("(ab|c1){3}", text_of(tokens)) and tokens[-1] in EOS


def test_min_tokens_yields_where_only_the_end_is_legal() -> None:
    wanted = replace(PARAMS, min_tokens=4)
    assert generated(book(), replace(wanted, grammar=regex("ab|a1b")))[-1] in EOS
    tokens = generated(book(), replace(wanted, grammar=regex("a*b*")))
    assert len(tokens) > 4 and not set(tokens[:4]) & set(EOS)


def test_a_model_that_rules_everything_legal_out_is_overruled() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[WORDS.index("1")] = 5.0
    assert sample(book(), sequence(replace(PARAMS, grammar=regex("a"))), logits) == WORDS.index("a")


def test_with_ignore_eos_nothing_follows_the_end() -> None:
    tokens = generated(book(), replace(PARAMS, grammar=regex("ab"), ignore_eos=True, max_tokens=9))
    assert text_of(tokens) == "ab" and set(tokens[2:]) <= set(EOS) and len(tokens) == 9


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    """Preemption keeps the sequence; one that is met with output already there is caught up with."""
    params = replace(PARAMS, grammar=regex("(abc|1)*2?}"), seed=5, max_tokens=30)
    whole = generated(book(), params)
    for cut in range(len(whole)):
        of = book()
        met_late = sequence(params, tuple(whole[:cut]))
        assert sample(of, met_late) == whole[cut]
        assert sample(of, met_late) == whole[cut], "asked twice for one token, as after a preemption"


def test_branches_follow_the_grammar_each_for_itself() -> None:
    params = replace(PARAMS, grammar=regex("[abc1]{6}"), seed=3)
    of = book()
    rows = [sequence(params, branch=branch) for branch in range(6)]
    for _ in range(7):
        live = [row for row in rows if not set(row.output_ids.tolist()) & set(EOS)]
        if live:
            for row, token in zip(live, sample_all(of, live, torch.zeros(len(live), VOCAB)), strict=True):
                row.append(token)
    texts = [text_of(row.output_ids.tolist()) for row in rows]
    assert all(re.fullmatch("[abc1]{6}", text) for text in texts) and len(set(texts)) > 1
    assert [text_of(generated(book(), params, branch)) for branch in range(6)] == texts


def test_a_row_without_grammar_is_untouched_beside_one_with() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB)
    plain, bound = sequence(replace(PARAMS, seed=7)), sequence(replace(PARAMS, grammar=regex("1")))
    both = sample_all(book(), [plain, bound], logits)
    alone = Sampler(VOCAB, EOS).sample(logits[:1], [sequence(replace(PARAMS, seed=7))])
    assert both[0] == alone[0] and both[1] == WORDS.index("1")


@pytest.mark.parametrize(
    ("grammar", "output"), [("{bad json", ()), (regex("xyz"), ()), (regex("ab"), ids("b"))]
)
def test_a_grammar_without_a_way_on_is_that_rows_own_end(grammar: str, output: tuple[int, ...]) -> None:
    dead, well = (
        sequence(replace(PARAMS, grammar=grammar), output),
        sequence(replace(PARAMS, temperature=0.0)),
    )
    assert sample_all(book(), [dead, well], torch.zeros(2, VOCAB)) == [NO_CONTINUATION, 0]


# -- reasoning ------------------------------------------------------------------------------------------

REASONING = replace(PARAMS, grammar=regex("1[2b]"), reasoning_end=(THINK_END,))


def test_the_grammar_begins_after_the_reasoning() -> None:
    of = book()
    seq = sequence(REASONING)
    assert legal_ids(of, seq) == set(range(VOCAB)) - set(EOS), "an answer has to follow"
    for token in ids("c", "ab", "}"):
        seq.append(token)
        assert legal_ids(of, seq) == set(range(VOCAB)) - set(EOS)
    seq.append(THINK_END)
    assert legal_ids(of, seq) <= set(ids("1", "12"))
    for token in ids("1", "b"):
        seq.append(token)
    assert legal_ids(of, seq) == set(EOS)


@pytest.mark.parametrize("end", [ids("a"), ids("a", "b"), ids("a", "a"), ids("a", "b", "a", "c")])
@pytest.mark.parametrize("seed", range(8))
def test_the_budget_forces_the_end_of_reasoning(end: tuple[int, ...], seed: int) -> None:
    budget = 5
    params = replace(REASONING, reasoning_end=end, thinking_budget=budget, seed=seed)
    tokens = generated(book(), params)
    places = [i + len(end) for i in range(len(tokens)) if tuple(tokens[i : i + len(end)]) == end]
    assert places and places[0] <= budget + len(end)
    assert text_of(tokens[places[0] :]) in ("12", "1b") and tokens[-1] in EOS


def test_a_budget_alone_leaves_the_answer_free() -> None:
    params = replace(PARAMS, temperature=0.0, reasoning_end=(THINK_END,), thinking_budget=2, max_tokens=8)
    assert generated(book(), params) == [0, 0, THINK_END, 0, 0, 0, 0, 0]


def test_reasoning_that_ends_early_needs_no_force() -> None:
    params = replace(PARAMS, temperature=0.0, reasoning_end=(THINK_END,), thinking_budget=3)
    of = book()
    seq = sequence(params, (0, THINK_END, 0, 0, 0, 0))
    assert legal(of, seq) is None and sample(of, seq) == 0


def test_json_grammars_are_json() -> None:
    schema = json.dumps({"grammars": [{"json_schema": {"type": "object", "additionalProperties": False}}]})
    assert text_of(generated(book(), replace(PARAMS, grammar=schema))) == "{}"
