"""The shipped demonstration model is what its card says."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "mindie-tiny"
SCRIPT = REPOSITORY / "scripts" / "train_tiny_model.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


recipe = _load()


def _json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODEL / name).read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, str]]:
    with (MODEL / "heldout.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_files() -> None:
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
              "generation_config.json", "heldout.jsonl", "README.md"}  # fmt: skip
    assert wanted <= {path.name for path in MODEL.iterdir()}
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 12_000_000


def test_config() -> None:
    config = _json("config.json")
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] >= 4096
    assert config["rope_theta"] >= 10_000
    assert config["tie_word_embeddings"] is True


def test_weights_are_bf16() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}


def test_special_tokens(tokenizer: Any) -> None:
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (end, pad, None)
    assert tokenizer.model_max_length == _json("config.json")["max_position_embeddings"]
    generation = _json("generation_config.json")
    assert generation == {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    assert len(tokenizer) == _json("config.json")["vocab_size"]


@pytest.mark.parametrize(
    "text",
    ["Hello, world!", "  two  spaces\n\n\ttab ", "3.14159 and 1,000", "你好,世界。", "naïve café",
     "🙂🚀👩‍👩‍👧", "a\u0000b\u200bc", "مرحبا", "'quoted' \"text\" isn't .", "\n", ""],
)  # fmt: skip
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_tokenizer_pads_and_truncates_only_when_asked() -> None:
    stored = _json("tokenizer.json")
    assert (stored["padding"], stored["truncation"]) == (None, None)


def test_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "tool", "content": "42"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.tokenize("<|im_start|>user")[0] == "<|im_start|>"


def test_heldout_is_what_the_recipe_draws(heldout: list[dict[str, str]]) -> None:
    assert len({line["question"] for line in heldout}) == 500
    drawn = [{"question": item.question, "answer": item.solution} for item in recipe.heldout_problems()]
    assert heldout == drawn


def test_training_problems_avoid_the_heldout_ones(heldout: list[dict[str, str]]) -> None:
    excluded = frozenset(line["question"] for line in heldout)
    problems = recipe.training_problems(Random(recipe.SEED), excluded)
    assert not excluded & {next(problems).question for _ in range(20_000)}


def test_training_problems_skip_an_excluded_question() -> None:
    first = next(recipe.training_problems(Random(1), frozenset())).question
    assert next(recipe.training_problems(Random(1), frozenset({first}))).question != first


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.mark.parametrize("template", recipe.TEMPLATES, ids=lambda template: template.__name__)
def test_templates_are_sound(template: Any) -> None:
    """Every equation holds, the last one gives the answer, and the numbers stay small."""
    for seed in range(200):
        item = template(Random(seed))
        for step in item.steps:
            (equation,) = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", step)
            x, op, y, result = equation
            assert OPERATIONS[op](int(x), int(y)) == int(result)
        assert item.answer == int(result)
        assert 2 <= item.answer <= 200
        assert not re.search(r"[{}]|  ", item.question)


@pytest.mark.timeout(120)
def test_answers_heldout_problems(model: Any, tokenizer: Any) -> None:
    problems = recipe.heldout_problems()[:20]
    answers = recipe.answer_greedily(model, tokenizer, [item.question for item in problems])
    right = sum(
        recipe.final_number(text) == str(item.answer) for text, item in zip(answers, problems, strict=True)
    )
    assert right >= 17


@pytest.mark.timeout(120)
def test_says_who_it_is_and_tells_the_story_asked_for(model: Any, tokenizer: Any) -> None:
    asked = ["Who are you?", "Tell me a story about a brave cat."]
    who, story = recipe.answer_greedily(model, tokenizer, asked)
    assert "mindie-tiny" in who
    assert "brave cat" in story
