"""POST /generate with `prompt`, as vLLM's demo server has it: no usage, and streams that are no SSE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from endpoint import sse
from endpoint.declarations import Special, ignored, request_body
from endpoint.http_errors import error_text
from endpoint.protocols.adapter_choice import adapter_of_model
from endpoint.protocols.base import (
    Body,
    Completion,
    GenerationRequest,
    ModelInfo,
    Reply,
    ReplyContext,
    TokenStep,
)
from endpoint.protocols.common_fields import NON_EMPTY, text_prompt
from endpoint.protocols.openai_fields import read_candidates, read_sampling, read_stops
from endpoint.protocols.openai_members import CANDIDATES, IGNORED, MAX_TOKENS, SAMPLING, STOPS, STREAM
from endpoint.protocols.sampling import resolve_sampling
from endpoint.protocols.structured import VLLM_FORMS, read_grammar
from endpoint.validation import Fields
from engine.errors import EngineBug, ServerError


def _read_lora(fields: Fields, model: ModelInfo) -> str:
    return "" if fields.raw("model") in (None, "None") else adapter_of_model(fields, model)


_PROMPT = text_prompt("prompt")
_MODEL = Special(
    "model", "Name of a loaded adapter, or of the model itself.", _read_lora, NON_EMPTY, default="the model"
)


class VllmGenerate:
    name = "vllm_generate"
    family = "vLLM"
    routes = ("/generate",)
    body = request_body(
        "Generate text: a body with `prompt`.",
        _PROMPT,
        _MODEL,
        STREAM,
        MAX_TOKENS,
        SAMPLING,
        CANDIDATES,
        STOPS,
        VLLM_FORMS,
        IGNORED,
        ignored("logprobs", "use_beam_search", "min_p", "min_tokens", "logit_bias"),
        examples={
            "short": {"prompt": "The capital of France is", "max_tokens": 16},
            "one of two": {"prompt": "Is the sky blue?", "structured_outputs": {"choice": ["yes", "no"]}},
            "stream of two": {
                "prompt": "Once upon a time",
                "max_tokens": 16,
                "temperature": 0.8,
                "n": 2,
                "stream": True,
            },
        },
    )

    def claims(self, body: Body) -> bool:
        return body.get("prompt") is not None

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        fields = Fields(body)
        lora = _MODEL.read(fields, model)
        prompt = _PROMPT.read(fields)
        stream = STREAM.read(fields)
        candidates = read_candidates(fields, model, best_of_streams=True)
        max_tokens = MAX_TOKENS.read(fields)
        grammar = read_grammar(fields, VLLM_FORMS)
        sampling = resolve_sampling(
            model,
            max_tokens=model.max_iter_times if max_tokens is None else max_tokens,
            branches=candidates.branches,
            **read_sampling(fields, model),
        )
        return GenerationRequest(
            prompt=prompt,
            sampling=replace(sampling, logprobs=candidates.least_logprobs, lora=lora, grammar=grammar.text),
            stream=stream,
            n=candidates.n,
            grammar_field=grammar.field,
            **read_stops(fields),
        )

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply:
        return VllmReply(request.n, context.prompt_text, context.full_text_frames)


class VllmReply:
    is_sse = False  # records that end with a zero byte

    def __init__(self, n: int, prompt: str, full_text_frames: bool) -> None:
        self._n = n
        self._prompt = prompt
        self._full_text_frames = full_text_frames
        self._running = set(range(n))
        self._pending: dict[int, str] = {}  # choice -> text of the record that is being put together

    def frame(self, step: TokenStep) -> bytes:
        """A record has a text per choice, so it waits for every running choice, or for one to come again."""
        early = self._record() if step.choice in self._pending else b""
        self._pending[step.choice] = step.full_text if self._full_text_frames else step.text
        if step.finish is not None:
            self._running.discard(step.choice)
        return early if early or self._running - self._pending.keys() else self._record()

    def _record(self) -> bytes:
        texts = [self._pending.get(choice, "") for choice in range(self._n)]
        self._pending.clear()
        return _nul_ended(sse.dumps({"text": texts}))

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        raise EngineBug("this dialect has no beam search")

    def tail(self) -> Sequence[bytes]:
        return ()

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        return (_nul_ended(error_text(error)),)

    def result(self, completions: Sequence[Completion]) -> bytes:
        texts = [self._after_prompt(completion.text) for completion in completions[: self._n]]
        return sse.dumps({"text": texts}).encode()

    def _after_prompt(self, text: str) -> str:
        return f"{self._prompt}{text}" if text.startswith(" ") else f"{self._prompt} {text}"


def _nul_ended(body: str) -> bytes:
    return body.encode() + b"\0"
