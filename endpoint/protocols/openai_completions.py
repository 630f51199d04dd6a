"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from endpoint import sse
from endpoint.declarations import Flag, Integer, Special, ignored, request_body
from endpoint.protocols.base import (
    Body,
    Completion,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PromptToken,
    Reply,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.protocols.common_fields import NON_EMPTY, TOKEN_IDS
from endpoint.protocols.completion_prompt import check_sequences, read_prompt
from endpoint.protocols.openai_fields import COMMON, read_openai
from endpoint.protocols.openai_members import MODEL
from endpoint.protocols.openai_reply import FINISH, OpenAIReply, prompt_logprobs
from endpoint.validation import Fields, Range


def _check_suffix(fields: Fields) -> None:
    suffix = fields.raw("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise fields.error("suffix", "a string")
    if suffix:
        raise fields.unsupported("suffix")


_PROMPT = Special(
    "prompt",
    "A text or token ids, or a list of either; at most maxBatchSize of them.",
    read_prompt,
    {
        "anyOf": [
            NON_EMPTY,
            TOKEN_IDS,
            {"type": "array", "minItems": 1, "items": NON_EMPTY},
            {"type": "array", "minItems": 1, "items": TOKEN_IDS},
        ]
    },
    required=True,
)
_SUFFIX = Special("suffix", "Must be empty.", _check_suffix, {"type": "string", "maxLength": 0})
_ECHO = Flag("echo", "Puts the prompt before the text.")
_LOGPROBS = Integer(
    "logprobs",
    "Tells the probability of every token, and of so many of the most likely ones.",
    Range(0, 5),
)


class OpenAICompletions:
    name = "openai_completions"
    family = "OpenAI"
    routes = ("/v1/completions",)
    body = request_body(
        "Continue a text.",
        _PROMPT,
        COMMON,
        _LOGPROBS,
        _ECHO,
        _SUFFIX,
        ignored("top_logprobs", "reasoning_effort"),
        examples={
            "short": {"model": "", "prompt": "The capital of France is", "max_tokens": 16},
            "stream": {
                "model": "",
                "prompt": "Once upon a time",
                "max_tokens": 16,
                "temperature": 0.8,
                "seed": 7,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            "token ids": {"model": "", "prompt": [5, 6, 7, 8], "max_tokens": 8, "logprobs": 2},
        },
    )

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        MODEL.read(fields, model)  # a wrong model is wrong whatever else is
        prompt = _PROMPT.read(fields, model)
        _SUFFIX.read(fields)
        echo = _ECHO.read(fields)
        logprobs = _LOGPROBS.read(fields)
        request = read_openai(fields, model, prompt, -1 if logprobs is None else logprobs, echo=echo)
        check_sequences(fields, request, model)
        return request

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return CompletionsReply(request, body, context)


class CompletionsReply(OpenAIReply):
    chunk_object = "text_completion"
    result_object = "text_completion"

    def __init__(self, request: GenerationRequest, body: Body, context: ReplyContext) -> None:
        super().__init__(request, body, context)
        self._echoes = context.echoes
        self._logprobs: int | None = body.get("logprobs")
        self._offsets = [0] * request.num_choices

    def _unfinished_choice(self, step: TokenStep, text: str) -> str:
        logprobs = self._step_logprobs(step)
        return (
            f'{{"index":{step.choice},"text":{sse.json_text(self._with_echo(step, text))},'
            f'"logprobs":{"null" if logprobs is None else sse.dumps(logprobs)},'
            '"stop_reason":null,"finish_reason":null}'
        )

    def _last_choice(self, step: TokenStep, text: str) -> dict[str, Any]:
        text, logprobs = self._with_echo(step, text), self._step_logprobs(step)
        return _choice(step.choice, text, logprobs, step.stop_reason, step.finish)

    def _whole_choices(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        choices = []
        offset = 0  # of the choice's first token: the choices are counted through
        for index, completion in enumerate(completions):
            text = self._echo(index) + completion.text
            logprobs = self._all_logprobs(completion, offset)
            choice = _choice(index, text, logprobs, completion.stop_reason, completion.finish)
            if self._prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(completion.prompt, self._prompt_logprobs)
            choices.append(choice)
            if logprobs is not None:
                offset += sum(map(len, logprobs["tokens"]))
        return choices

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        self._note_whole(completions)
        members = {"choices": self._whole_choices(completions)}
        return [self._chunk({**members, **self._usage_member(self._counts)})]

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._n] if self._echoes else ""

    def _with_echo(self, step: TokenStep, text: str) -> str:
        if self._echoes and (step.index == 0 or self._context.full_text_frames):
            return self._echo(step.choice) + text
        return text

    def _step_logprobs(self, step: TokenStep) -> dict[str, Any] | None:
        if self._logprobs is None or step.logprob is None:
            return None
        lists = self._lists(step.prompt, [(step.logprob, step.top_logprobs)], self._offsets[step.choice])
        self._offsets[step.choice] += sum(map(len, lists["tokens"]))
        return lists

    def _all_logprobs(self, completion: Completion, offset: int) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        pairs = zip(completion.logprobs, completion.top_logprobs, strict=True)
        return self._lists(completion.prompt, pairs, offset)

    def _lists(
        self,
        prompt: Sequence[PromptToken],
        tokens: Iterable[tuple[TokenLogprob, Sequence[TokenLogprob]]],
        offset: int,
    ) -> dict[str, list[Any]]:
        """Four parallel lists. `offset`: characters of token text before them."""
        lists: dict[str, list[Any]] = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []
        }  # fmt: skip
        if self._echoes and self._logprobs is not None:
            _add_prompt(lists, prompt, self._logprobs)
        _add_tokens(lists, tokens)
        for text in lists["tokens"]:
            lists["text_offset"].append(offset)
            offset += len(text)
        return lists


def _add_prompt(lists: dict[str, list[Any]], prompt: Sequence[PromptToken], num_top: int) -> None:
    """As if the model had written the prompt, but for its first token, of which it cannot say anything."""
    for entry in prompt:
        others = entry.others[: num_top - 1 if entry.rank <= num_top else num_top]
        known = entry.rank > 0
        lists["token_logprobs"].append(entry.token.logprob if known else None)
        lists["tokens"].append(entry.token.text)
        lists["top_logprobs"].append(_by_text(entry.token, others) if known else None)


def _add_tokens(
    lists: dict[str, list[Any]], tokens: Iterable[tuple[TokenLogprob, Sequence[TokenLogprob]]]
) -> None:
    for token, top in tokens:
        lists["token_logprobs"].append(token.logprob)
        lists["tokens"].append(token.text)
        lists["top_logprobs"].append(_by_text(token, top))


def _by_text(token: TokenLogprob, others: Iterable[TokenLogprob]) -> dict[str, float]:
    by_text = {token.text: token.logprob}
    for other in others:
        by_text.setdefault(other.text, other.logprob)
    return by_text


def _choice(
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    stop_reason: str | int | None,
    finish: FinishReason | None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "stop_reason": stop_reason,
        "finish_reason": FINISH[finish] if finish else None,
    }
