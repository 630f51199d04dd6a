"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from endpoint import sse
from endpoint.protocols.base import (
    Body,
    Completion,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenLogprob,
    TokenStep,
)
from endpoint.protocols.openai_fields import check_model, read_openai
from endpoint.protocols.openai_reply import FINISH, OpenAIReply
from endpoint.validation import Fields, Range, checked_prompt_text, refuse_unsupported, token_ids

_LOGPROBS = Range(0, 5)


class OpenAICompletions:
    name = "openai_completions"
    routes = ("/v1/completions",)

    def claims(self, body: Body) -> bool:
        return True

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        check_model(fields, model)
        prompt = _prompt(fields, model.vocab_size)
        suffix = fields.raw("suffix")
        if suffix is not None and not isinstance(suffix, str):
            raise fields.error("suffix", "a string")
        echo = fields.flag("echo")
        refuse_unsupported(fields, {"suffix": bool(suffix), "echo": echo and not isinstance(prompt, str)})
        logprobs = fields.integer("logprobs", _LOGPROBS)
        return read_openai(fields, model, prompt, -1 if logprobs is None else logprobs)

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return CompletionsReply(request, body, context)


class CompletionsReply(OpenAIReply):
    chunk_object = "text_completion"
    result_object = "text_completion"

    def __init__(self, request: GenerationRequest, body: Body, context: ReplyContext) -> None:
        super().__init__(request, body, context)
        self._echo = context.prompt_text if body.get("echo") is True else ""
        self._logprobs: int | None = body.get("logprobs")
        self._offsets = [0] * request.n

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
            logprobs = self._all_logprobs(completion, offset)
            text, stop_reason, finish = (
                self._echo + completion.text,
                completion.stop_reason,
                completion.finish,
            )
            choices.append(_choice(index, text, logprobs, stop_reason, finish))
            offset += sum(len(token.text) for token in completion.logprobs)
        return choices

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        self._note_whole(completions)
        members = {"choices": self._whole_choices(completions)}
        return [self._chunk({**members, **self._usage_member(self._counts)})]

    def _with_echo(self, step: TokenStep, text: str) -> str:
        return self._echo + text if step.index == 0 or self._context.full_text_frames else text

    def _step_logprobs(self, step: TokenStep) -> dict[str, Any] | None:
        if self._logprobs is None or step.logprob is None:
            return None
        offset = self._offsets[step.choice]
        self._offsets[step.choice] = offset + len(step.logprob.text)
        return _logprob_lists([(step.logprob, step.top_logprobs)], offset)

    def _all_logprobs(self, completion: Completion, offset: int) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return _logprob_lists(zip(completion.logprobs, completion.top_logprobs, strict=True), offset)


def _logprob_lists(
    tokens: Iterable[tuple[TokenLogprob, Sequence[TokenLogprob]]], offset: int
) -> dict[str, list[Any]]:
    """Four parallel lists. `offset`: characters of token text before the first of `tokens`."""
    lists: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, top in tokens:
        by_text = {token.text: token.logprob}
        for other in top:
            by_text.setdefault(other.text, other.logprob)
        lists["text_offset"].append(offset)
        lists["token_logprobs"].append(token.logprob)
        lists["tokens"].append(token.text)
        lists["top_logprobs"].append(by_text)
        offset += len(token.text)
    return lists


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


def _prompt(fields: Fields, vocab_size: int) -> str | tuple[int, ...]:
    value = fields.raw("prompt")
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        # a list of prompts; a list of one is one prompt
        if len(value) > 1:
            raise fields.unsupported("prompt", "send one prompt per request")
        fields, value = Fields({"prompt": value[0]}), value[0]
    if isinstance(value, str):
        return checked_prompt_text(fields, "prompt", value)
    if isinstance(value, list):
        return token_ids(fields, "prompt", vocab_size)
    raise fields.error("prompt", "a non-empty string or a non-empty array of token ids", "send a prompt")
