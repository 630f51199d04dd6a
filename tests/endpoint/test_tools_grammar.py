"""Forced calls: whatever a model would like to write, its answer is calls the parser reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import llguidance
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from endpoint.protocols.base import ChatFormat
from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.tokenizer import TokenizerPool
from endpoint.tools.registry import FORMATS
from engine.errors import InvalidRequest
from tests.endpoint.call_texts import Read, read
from tests.endpoint.samples import model_info
from tests.endpoint.tiny_tokenizers import byte_level, save

FORMS = ["hermes", "llama3", "deepseek_v3", "deepseek_v31"]
MOST_TOKENS = 600
END = "</s>"
TOOLS: dict[str, Mapping[str, Any] | None] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city", "unit"],
        "$defs": {"unit": {"enum": ["C", 'the "F"', "\u5ea6"]}},
    },
    "weather_at": {
        "type": ["object", "null"],
        "properties": {
            "at": {
                "type": "array",
                "items": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}},
                "maxItems": 3,
            },
            "exact": {"type": "boolean"},
        },
        "required": ["exact"],
    },
    "\u5929\u6c14": {
        "type": "object",
        "properties": {"x": {"anyOf": [{"type": "null"}, {"const": {"a": [1]}}]}},
    },
}


class Vocabulary:
    """A tokenizer in which the markers of a format are special tokens, or are not."""

    def __init__(self, directory: Path, form: str, special: bool) -> None:
        tokenizer = byte_level()
        if special:
            tokenizer.add_special_tokens(list(FORMATS[form].markers))
        directory.mkdir()
        save(tokenizer, directory)
        self.pool = TokenizerPool(directory, threads=1)
        self.eos = self.pool.special_by_text[END]
        self.library = llguidance.LLTokenizer(str(directory / "tokenizer.json"), eos_token=self.eos)
        self.chat = ChatFormat(
            tools=form,
            special_ids={m: i for m, i in self.pool.special_by_text.items() if m in FORMATS[form].markers},
        )

    def grammar(self, **members: Any) -> str:
        tools = [
            {"type": "function", "function": {"name": name, **({} if p is None else {"parameters": p})}}
            for name, p in TOOLS.items()
        ]
        body = {"model": "llama", "messages": [{"role": "user", "content": "a"}], "tools": tools, **members}
        return OpenAIChat().parse(body, replace(model_info(), chat=self.chat), {}).sampling.grammar

    def any_answer(self, grammar: str, seed: int) -> str:
        """What a model with random wishes writes; the end is not unlikely, or strings would never end."""
        rng = Random(seed)
        matcher = llguidance.LLMatcher(self.library, grammar)
        mask = allocate_token_bitmask(1, self.library.vocab_size)
        ids: list[int] = []
        while len(ids) < MOST_TOKENS:
            fill_next_token_bitmask(matcher, mask)
            assert not matcher.is_error(), matcher.get_error()
            allowed = [i for i in range(self.library.vocab_size) if mask[0][i // 32] >> (i % 32) & 1]
            assert allowed
            ending = [i for i in allowed if i == self.eos or self.pool.decode([i]) in ('"', "}", "]")]
            token = rng.choice(ending if ending and rng.random() < 0.3 else allowed)
            if token == self.eos:
                assert matcher.is_accepting()
                return self.pool.decode(ids, skip_special_tokens=False)
            ids.append(token)
            assert matcher.consume_token(token)
        raise AssertionError(self.pool.decode(ids, skip_special_tokens=False))


@pytest.fixture(params=[(form, special) for form in FORMS for special in (False, True)], ids=str)
def words(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    return Vocabulary(tmp_path / "model", *request.param)


def checked(found: Read) -> Read:
    assert found.content.strip() == "" and found.calls
    for name, arguments, complete in found.calls:
        assert complete
        jsonschema.validate(json.loads(arguments), TOOLS[name] or {"type": "object"})
    return found


def test_a_required_call_is_written_whatever_the_model_wants(words: Vocabulary) -> None:
    grammar = words.grammar(tool_choice="required")
    found = [checked(read(words.chat.tools, words.any_answer(grammar, seed))) for seed in range(12)]
    assert {name for of in found for name, *_ in of.calls} == set(TOOLS)
    assert max(len(of.calls) for of in found) > 1


def test_one_call_when_not_parallel(words: Vocabulary) -> None:
    grammar = words.grammar(tool_choice="required", parallel_tool_calls=False)
    for seed in range(6):
        assert len(checked(read(words.chat.tools, words.any_answer(grammar, seed))).calls) == 1


@pytest.mark.parametrize("name", TOOLS)
def test_a_named_call_is_the_only_one(words: Vocabulary, name: str) -> None:
    grammar = words.grammar(tool_choice={"type": "function", "function": {"name": name}})
    for seed in range(3):
        found = checked(read(words.chat.tools, words.any_answer(grammar, seed)))
        assert [call[0] for call in found.calls] == [name]


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}])
def test_without_parameters_the_arguments_are_any_object(
    parameters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Vocabulary(tmp_path / "model", "hermes", special=False)
    monkeypatch.setattr("tests.endpoint.test_tools_grammar.TOOLS", {"f": parameters})
    checked(read("hermes", words.any_answer(words.grammar(tool_choice="required"), 1)))
    library = llguidance.LLMatcher(words.library, words.grammar(tool_choice="required"))
    text = '<tool_call>\n{"name": "f", "arguments": {"any": [1, {"thing": null}]}}\n</tool_call>'
    assert library.consume_tokens(words.library.tokenize_str(text)) and library.is_accepting()


def test_a_grammar_out_of_proportion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Vocabulary(tmp_path / "model", "hermes", special=False)
    monkeypatch.setattr(
        "tests.endpoint.test_tools_grammar.TOOLS", {"f": {"enum": [{"a": "x" * 100_000}], "type": "object"}}
    )
    with pytest.raises(InvalidRequest, match=r"`tools` make a grammar of \d+ bytes.*at most"):
        words.grammar(tool_choice="required")
    assert words.grammar(tool_choice="auto") == ""
