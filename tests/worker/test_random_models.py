"""The promise of structured output: whatever a model prefers, what it writes parses and conforms."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from endpoint.protocols.structured import FORMS, read_grammar
from endpoint.validation import Fields
from engine.executor import NOT_YET
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.tokenizer_files import load_tokenizer
from tests.harness import TINY_MODEL
from worker.grammar import GrammarBook
from worker.masks.client import MaskClient
from worker.masks.keeper import Vocabulary
from worker.sampler import Sampler

Json = dict[str, Any]
VOCAB, EOS = 2048, [2, 0]
SCHEMAS = 200
MAX_TOKENS = 400
NAMES = ["id", "name", "value", "größe", 'quo"te', "a b", "x.y", "items"]
TEXTS = ["", "red", "two words", 'with "quotes"', "back\\slash", "line\nbreak", "ünï"]


class Schemas:
    """Random schemas of what api.md promises and some more; deep ones get simpler towards their leaves."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def any(self, depth: int = 0) -> Json:
        leaves = [self.string, self.integer, self.number, self.enum, self.const, self.atom, self.union]
        inner = [self.object, self.object, self.array, self.choice]
        return self.rng.choice(leaves if depth >= 3 else [*leaves, *inner, *inner])(depth)

    def object(self, depth: int = 0) -> Json:
        names = self.rng.sample(NAMES, self.rng.randint(0, 4))
        schema: Json = {"type": "object", "properties": {name: self.any(depth + 1) for name in names}}
        schema["required"] = [name for name in names if self.rng.random() < 0.6]
        if self.rng.random() < 0.3:
            schema["additionalProperties"] = self.rng.choice(
                [False, self.integer(depth), {"type": "boolean"}]
            )
        if self.rng.random() < 0.3:
            schema["description"] = "what it is"
        return schema

    def array(self, depth: int) -> Json:
        schema: Json = {"type": "array", "items": self.any(depth + 1)}
        if self.rng.random() < 0.7:
            schema["maxItems"] = self.rng.randint(1, 4)
            schema["minItems"] = self.rng.randint(0, schema["maxItems"])
        return schema

    def choice(self, depth: int) -> Json:
        return {"anyOf": [self.any(depth + 1) for _ in range(self.rng.randint(1, 3))]}

    def string(self, depth: int) -> Json:
        pattern = self.rng.choice(["^[a-z]{2,5}$", "^(ab|cd)+$", r"^\d{4}-\d{2}$", None, None])
        if pattern is not None:
            return {"type": "string", "pattern": pattern}
        low = self.rng.randint(0, 4)
        bounds = {"minLength": low, "maxLength": low + self.rng.randint(0, 10)}
        return {"type": "string", **(bounds if self.rng.random() < 0.7 else {})}

    def integer(self, depth: int) -> Json:
        low = self.rng.randint(-50, 50)
        kind = self.rng.random()
        if kind < 0.4:
            return {"type": "integer", "minimum": low, "maximum": low + self.rng.randint(0, 1000)}
        if kind < 0.6:
            return {"type": "integer", "exclusiveMinimum": low}
        if kind < 0.7:
            return {"type": "integer", "multipleOf": self.rng.randint(2, 9)}
        return {"type": "integer"}

    def number(self, depth: int) -> Json:
        low = round(self.rng.uniform(-5, 5), 1)
        return {
            "type": "number",
            **({"minimum": low, "maximum": low + 7.25} if self.rng.random() < 0.6 else {}),
        }

    def enum(self, depth: int) -> Json:
        values = [*TEXTS, 0, -1, 2.5, True, False, None, [1, 2], {"k": "v"}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 5))}

    def const(self, depth: int) -> Json:
        return {"const": self.rng.choice([*TEXTS, 7, None, {"a": [1]}])}

    def atom(self, depth: int) -> Json:
        return {"type": self.rng.choice(["boolean", "null", "string"])}

    def union(self, depth: int) -> Json:
        return {"type": self.rng.sample(["string", "integer", "null", "boolean"], 2)}


@pytest.fixture(scope="module")
def sampler() -> Iterator[Sampler]:
    masks = MaskClient(Vocabulary(TINY_MODEL, False, VOCAB, EOS), slots=8)
    yield Sampler(VOCAB, EOS, GrammarBook(masks))
    masks.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_MODEL, False)


def sample(sampler: Sampler, logits: torch.Tensor, seq: Sequence) -> int:
    while (token := int(sampler.sample(logits, [seq])[0])) == NOT_YET:
        pass
    return token


def answer(sampler: Sampler, grammar: str, seed: int) -> list[int]:
    """Tokens of a model whose logits are noise, new at every token, with an EOS that it never prefers."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, grammar=grammar)
    seq = Sequence(0, np.zeros(1, np.int32), params)
    noise = torch.Generator().manual_seed(seed)
    while seq.num_output < MAX_TOKENS and not (seq.num_output and int(seq.output_ids[-1]) in EOS):
        token = sample(sampler, torch.randn(1, VOCAB, generator=noise) * 3, seq)
        assert token >= 0, "a way on was promised"
        seq.append(token)
    return seq.output_ids.tolist()


@pytest.mark.parametrize("chunk", range(10))
def test_answers_of_a_random_model_conform(chunk: int, sampler: Sampler, tokenizer: Any) -> None:
    ended = 0
    for seed in range(chunk, SCHEMAS, 10):
        schema = Schemas(seed).object() if seed % 3 else Schemas(seed).any()
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        grammar = read_grammar(Fields({"response_format": form}), FORMS).text
        tokens = answer(sampler, grammar, seed)
        text = tokenizer.decode(tokens)
        if tokens[-1] in EOS:
            ended += 1
            jsonschema.validate(json.loads(text), closed(schema))
    assert ended > SCHEMAS // 10 * 0.5, "most answers end by themselves"


def closed(schema: Any) -> Any:
    """By the words of api.md: `additionalProperties` counts as false unless given."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict) or "enum" in schema or "const" in schema:
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        result["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
        result.setdefault("additionalProperties", False)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_cut_by_length_can_be_completed(seed: int, sampler: Sampler, tokenizer: Any) -> None:
    """Any prefix is legal: the same grammar, met in the middle of it, still finds a whole answer."""
    schema = Schemas(seed).object()
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    grammar = read_grammar(Fields({"response_format": form}), FORMS).text
    tokens = answer(sampler, grammar, seed)
    cut = tokens[: random.Random(seed).randint(0, len(tokens) - 1)]
    seq = Sequence(
        1, np.zeros(1, np.int32), SamplingParams(max_tokens=4000, temperature=1.0, grammar=grammar)
    )
    for token in cut:
        seq.append(token)
    # a model that would rather end: quotes, closing brackets and EOS are its favourites
    wish = torch.zeros(1, VOCAB)
    favourites = [*EOS, *(i for i in range(VOCAB) if tokenizer.decode([i]) in ('"', "}", "]", '"}'))]
    wish[0, favourites] = 20.0
    while seq.num_output < 2000:
        seq.append(sample(sampler, wish, seq))
        if int(seq.output_ids[-1]) in EOS:
            break
    jsonschema.validate(json.loads(tokenizer.decode(seq.output_ids.tolist())), closed(schema))


@pytest.mark.parametrize("seed", range(20))
def test_json_objects_of_a_random_model_parse(seed: int, sampler: Sampler, tokenizer: Any) -> None:
    grammar = read_grammar(Fields({"response_format": {"type": "json_object"}}), FORMS).text
    tokens = answer(sampler, grammar, seed)
    text = tokenizer.decode(tokens)
    assert text.startswith("{")
    if tokens[-1] in EOS:
        assert isinstance(json.loads(text), dict)
