"""The seam between dialects and the service: what an adapter receives and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from engine.errors import ServerError
from engine.sampling_params import SamplingParams

Body = Mapping[str, Any]


class FinishReason(Enum):
    """Why a request ended. The dialects word it differently (api.md section 3.7)."""

    EOS = "eos"
    STOP = "stop"  # stop string or stop token id
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an adapter may know of the served model when it checks a body."""

    name: str
    vocab_size: int
    max_iter_times: int
    max_prompt_tokens: int  # longer prompts are refused or truncated
    max_seq_len: int
    max_n: int
    generation_defaults: Mapping[
        str, Any
    ]  # generation_config.json: temperature, top_k, top_p, do_sample, ...
    created: int  # unix seconds of server start


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, still to be rendered by the model's chat template."""

    messages: Sequence[Mapping[str, Any]]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, whatever dialect it came in.

    `sampling.max_tokens` is what the client asked for (or the dialect's default), capped by
    maxIterTimes; the service clamps it once the number of prompt tokens is known.
    """

    prompt: str | tuple[int, ...] | ChatPrompt
    sampling: SamplingParams
    stream: bool
    n: int = 1  # choices returned; sampling.branches of them are generated
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the matched stop string (or token text) in the output
    skip_special_tokens: bool = True
    priority: int = 5  # 1 (first) .. 5 (last)
    timeout_s: int | None = None  # the client's own limit between two tokens
    client_id: str | None = None  # the client's name for it, by which it can be stopped
    keep_last: int | None = None  # use only so many tokens at the prompt's end (TGI's `truncate`)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability under the model's own distribution."""

    token_id: int
    text: str  # as it stands in the output, special tokens written out
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenStep:
    """What one engine step added to one choice of a request, as text.

    `text` is safe to send: no half characters, no part of a stop string that may still complete.
    It can be empty, then the frame still keeps the token cadence.
    """

    token_id: int
    text: str
    full_text: str  # all text so far, for fullTextEnabled and final frames
    index: int  # 0 for the first generated token
    latency_ms: float  # since arrival for the first token (prefill), since the last token otherwise
    batch_size: int
    queue_wait_us: int
    finish: FinishReason | None = None
    stop_reason: str | int | None = None  # the matched stop string or token id
    choice: int = 0  # index of the choice this step belongs to
    logprob: TokenLogprob | None = None  # of the chosen token, when sampling.logprobs >= 0
    top_logprobs: tuple[TokenLogprob, ...] = ()  # the sampling.logprobs most likely ones, best first


@dataclass(slots=True)
class Completion:
    """A whole answer: the steps added up."""

    text: str
    token_ids: list[int]
    finish: FinishReason
    stop_reason: str | int | None
    latencies_ms: list[float]  # first = prefill, others = decode steps
    batch_sizes: list[int]
    queue_waits_us: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per token, when asked for
    top_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReplyContext:
    """What a reply may need besides the steps; known once the request has been admitted."""

    request_number: int  # counter over the life of the server: `endpoint_common_<n>`
    model: ModelInfo
    prompt_tokens: int
    prompt_text: str  # for return_full_text and echo; empty for token-id prompts
    full_text_frames: bool  # config fullTextEnabled
    prompt_ids: Sequence[int] = ()  # what the model is fed: prompt_tokens ids, for TGI's `prefill`


class Reply(Protocol):
    """Formats the answer of one request. Made by `ProtocolAdapter.reply`, used by one handler only."""

    def frame(self, step: TokenStep) -> bytes:
        """One complete frame for a step; `step.finish` marks its choice's last. b"" sends nothing."""

    def beam_frames(self, completions: Sequence[Completion]) -> Sequence[bytes]:
        """The frames of a streamed beam search: whole choices, once all beams have ended."""

    def tail(self) -> Sequence[bytes]:
        """What follows the final frame at once (include_usage frame, [DONE]), one frame per element."""

    def error_frames(self, error: ServerError) -> Sequence[bytes]:
        """The frames that end a stream which has already begun."""

    def result(self, completions: Sequence[Completion]) -> bytes:
        """The JSON body of a non-stream answer.

        `completions`: the `request.n` choices in the order in which they are returned, then the candidates
        that were not chosen, which only usage counts.
        """


class ProtocolAdapter(Protocol):
    """One dialect on its routes. Stateless: everything about a request lives in its Reply."""

    name: str
    routes: tuple[str, ...]  # POST paths on the business plane, aiohttp syntax

    def claims(self, body: Body) -> bool:
        """Whether this dialect understands the body, where two share a path."""

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        """Check the body and resolve every default.

        Raises InvalidRequest (or NotFound for a wrong model in the path) with a text that names
        the field, its value, the legal range and what to do.
        """

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply: ...
