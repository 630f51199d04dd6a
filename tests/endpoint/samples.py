"""A model as adapters see it, and an answer in the form in which replies get it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from endpoint.protocols.base import (
    Completion,
    FinishReason,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)

VOCAB = 32_000
MAX_ITER_TIMES = 512


def model_info(name: str = "llama", **generation_defaults: Any) -> ModelInfo:
    return ModelInfo(
        name=name,
        vocab_size=VOCAB,
        max_iter_times=MAX_ITER_TIMES,
        max_prompt_tokens=2048,
        max_seq_len=2560,
        max_n=128,
        max_batch_size=200,
        generation_defaults=generation_defaults,
        created=1_744_038_000,
    )


def context(
    number: int = 10,
    prompt_tokens: int = 24,
    full_text: bool = False,
    model: str = "llama",
    prompt_text: str = "",
    prompt_ids: Sequence[int] = (),
    echoes: Sequence[str] = (),
    prompt_lengths: Sequence[int] = (),
    cached_tokens: Sequence[int] = (),
) -> ReplyContext:
    return ReplyContext(
        number,
        model_info(model),
        prompt_tokens,
        prompt_text,
        full_text,
        prompt_ids,
        echoes,
        prompt_lengths,
        cached_tokens=lambda: cached_tokens,
    )


def steps(
    texts: Sequence[str],
    ids: Sequence[int] | None = None,
    latencies_ms: Sequence[float] | None = None,
    queue_waits_us: Sequence[int] | None = None,
    finish: FinishReason = FinishReason.LENGTH,
    stop_reason: str | int | None = None,
    logprobs: Sequence[tuple[str, float, Sequence[tuple[str, float]]]] = (),
) -> list[TokenStep]:
    """One step per text; the last one carries `finish`. `logprobs`: token text, logprob and top ones."""
    count = len(texts)
    return [
        TokenStep(
            token_id=ids[index] if ids else 100 + index,
            text=text,
            full_text="".join(texts[: index + 1]),
            index=index,
            latency_ms=latencies_ms[index] if latencies_ms else 1.0,
            batch_size=1,
            queue_wait_us=queue_waits_us[index] if queue_waits_us else 7,
            finish=finish if index == count - 1 else None,
            stop_reason=stop_reason if index == count - 1 else None,
            logprob=TokenLogprob(0, *logprobs[index][:2]) if logprobs else None,
            top_logprobs=tuple(TokenLogprob(0, *top) for top in logprobs[index][2]) if logprobs else (),
        )
        for index, text in enumerate(texts)
    ]


def completion(of: Sequence[TokenStep]) -> Completion:
    last = of[-1]
    assert last.finish is not None
    return Completion(
        text=last.full_text,
        token_ids=[step.token_id for step in of],
        finish=last.finish,
        stop_reason=last.stop_reason,
        latencies_ms=[step.latency_ms for step in of],
        batch_sizes=[step.batch_size for step in of],
        queue_waits_us=[step.queue_wait_us for step in of],
        logprobs=[step.logprob for step in of if step.logprob is not None],
        top_logprobs=[step.top_logprobs for step in of if step.logprob is not None],
        prompt=of[0].prompt,
        pieces=[step.text for step in of],
    )


def interleaved(choices: Sequence[Sequence[TokenStep]]) -> list[TokenStep]:
    """The steps of several choices as a stream has them: the first of each, the second of each, ..."""
    rounds = zip_longest(*([replace(step, choice=i) for step in of] for i, of in enumerate(choices)))
    return [step for turn in rounds for step in turn if step is not None]


def stream(reply: Reply, of: Sequence[TokenStep]) -> list[str]:
    """The frames of a whole stream, as text."""
    frames = [reply.frame(step) for step in of] + list(reply.tail())
    return [frame.decode() for frame in frames]


def payload(frame: str) -> Any:
    assert frame.startswith("data: ") and frame.endswith("\n\n") and frame.count("\n") == 2, frame
    return json.loads(frame[6:-2])
