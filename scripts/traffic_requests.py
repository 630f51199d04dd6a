"""The proper requests of scripts/soak.py and scripts/chaos.py, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from fuzz_cases import NAME, SCHEMA, TRITON, good_message

Json = dict[str, Any]

_TOPICS = (
    "a brave cat", "a lost sailor", "an old mill", "a small dragon", "two friends", "a quiet village",
    "a curious robot", "a green boat", "the last train", "a tall tree", "a clever fox", "a snowy night",
)  # fmt: skip
_OPENINGS = (
    "Tell me a short story about {}.", "Who are you, and what do you know of {}?",
    "Once upon a time there was {}",
    "Tom has 12 apples and meets {}. He gives away 5. How many are left?", "Please write about {}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ask:
    """One proper request."""

    dialect: str
    path: str
    body: str  # JSON; text, so that asks can be compared and be keys
    stream: bool

    @property
    def message(self) -> bytes:
        return good_message(self.path, json.loads(self.body))


def greedy_ask(rng: random.Random, *, tokens: tuple[int, int]) -> Ask:
    """One with a single greedy choice and a seed, hence with the same text whenever it is sent.

    `tokens`: least and most of its answer.
    """
    prompt = rng.choice(_OPENINGS).format(rng.choice(_TOPICS))
    limit, stream = rng.randint(*tokens), rng.random() < 0.7
    openai: Json = {
        "model": NAME,
        "seed": 1,
        "max_tokens": limit,
        "temperature": 0,
        "stream": stream,
        "ignore_eos": True,
    }
    own: Json = {"parameters": {"max_new_tokens": limit, "do_sample": False, "seed": 1}}
    end = "generate_stream" if stream else "generate"
    shapes: dict[str, tuple[str, Json]] = {
        "chat": ("/v1/chat/completions", {**openai, "messages": [{"role": "user", "content": prompt}]}),
        "completions": ("/v1/completions", {**openai, "prompt": prompt}),
        "vllm": ("/generate", {**openai, "prompt": prompt}),
        "tgi": (f"/{end}", {"inputs": prompt, **own}),
        "triton": (f"{TRITON}/{end}", {"text_input": prompt, **own}),
        "native": ("/infer", {"inputs": prompt, "stream": stream, **own}),
    }
    dialect = rng.choice(list(shapes))
    path, body = shapes[dialect]
    return Ask(dialect, path, json.dumps(body), stream)


def _several_or_bound(rng: random.Random) -> Ask:
    """Sampling, several choices, log-probabilities, or an answer bound to a format."""
    prompt = rng.choice(_OPENINGS).format(rng.choice(_TOPICS))
    stream = rng.random() < 0.5
    chat: Json = {"model": NAME, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    completion: Json = {"model": NAME, "prompt": prompt, "max_tokens": rng.randint(4, 32), "stream": stream}
    schema = {"name": "trip", "schema": SCHEMA, "strict": True}
    shapes: list[tuple[str, Json]] = [
        ("/v1/completions", {**completion, "temperature": 0.9, "top_p": 0.9, "seed": rng.randrange(2**31)}),
        ("/v1/completions", {**completion, "temperature": 1.0, "n": 2, "logprobs": 2}),
        ("/v1/completions", {**completion, "structured_outputs": {"regex": "[a-z ]{5,30}"}}),
        ("/v1/completions", {**completion, "prompt": [prompt, "Once"], "stop": ["."]}),
        ("/v1/chat/completions", {**chat, "max_tokens": 48,
                                  "response_format": {"type": "json_schema", "json_schema": schema}}),
        ("/v1/chat/completions", {**chat, "max_tokens": 16, "use_beam_search": True, "n": 2}),
    ]  # fmt: skip
    path, body = rng.choice(shapes)
    return Ask("chat" if "messages" in body else "completions", path, json.dumps(body), stream)


def make_ask(rng: random.Random) -> Ask:
    return _several_or_bound(rng) if rng.random() < 0.15 else greedy_ask(rng, tokens=(4, 96))
