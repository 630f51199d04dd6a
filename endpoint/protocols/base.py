"""The seam between dialects and the service: what an adapter receives and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from endpoint.declarations import RequestBody
from endpoint.reasoning import Opening
from engine.errors import ServerError
from engine.sampling_params import SamplingParams

Body = Mapping[str, Any]

NO_TOKEN = -1


class FinishReason(Enum):
    """Why a request ended. The dialects word it differently (api.md section 3.7)."""

    EOS = "eos"
    STOP = "stop"  # stop string or stop token id
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How the served model writes what is not plain text."""

    tools: str = "hermes"  # a name of endpoint.tools.registry
    reasoning: bool = False  # whether reasoning is told apart from the answer
    special_ids: Mapping[str, int] = field(default_factory=dict)  # of markers that are special tokens


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an adapter may know of the served model when it checks a body."""

    name: str
    vocab_size: int
    max_iter_times: int
    max_prompt_tokens: int  # longer prompts are refused or truncated
    max_seq_len: int
    max_n: int
    max_batch_size: int  # prompts one request may hold
    generation_defaults: Mapping[
        str, Any
    ]  # generation_config.json: temperature, top_k, top_p, do_sample, ...
    created: int  # unix seconds of server start
    chat: ChatFormat = ChatFormat()
    # loaded LoRA adapters: name -> name of their directory; they come and go while the server runs
    adapters: Mapping[str, str] = field(default_factory=dict)
    one_answer: bool = False  # asynchronous scheduling serves one sequence for each prompt


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, still to be rendered by the model's chat template."""

    messages: Sequence[Mapping[str, Any]]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False  # the answer goes on where the last message ends
    template: str | None = None  # in place of the model's own: text, or a file name in the model's directory
    tools: Sequence[Mapping[str, Any]] = ()  # shown to the model, whose calls of them are then looked for


@dataclass(frozen=True, slots=True)
class PromptList:
    """Several prompts in one request, each answered by itself."""

    prompts: tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, whatever dialect it came in.

    `sampling.max_tokens` is what the client asked for (or the dialect's default), capped by
    maxIterTimes; the service clamps it once the number of prompt tokens is known.
    """

    prompt: str | tuple[int, ...] | ChatPrompt | PromptList
    sampling: SamplingParams
    stream: bool
    n: int = 1  # choices returned per prompt; sampling.branches of them are generated
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the matched stop string (or token text) in the output
    skip_special_tokens: bool = True
    markers: tuple[str, ...] = ()  # special tokens that are not skipped, for the reply to find
    reasoning: bool = False  # the answer may begin with reasoning, which the reply tells apart
    priority: int = 5  # 1 (first) .. 5 (last)
    timeout_s: int | None = None  # the client's own limit between two tokens
    client_id: str | None = None  # the client's name for it, by which it can be stopped
    keep_last: int | None = None  # use only so many tokens at the prompt's end (TGI's `truncate`)
    echo: bool = False  # the prompt's text comes before the answer's
    grammar_field: str = ""  # what asks for sampling.grammar, as the client wrote it

    @property
    def prompts(self) -> tuple[str | tuple[int, ...] | ChatPrompt, ...]:
        return self.prompt.prompts if isinstance(self.prompt, PromptList) else (self.prompt,)

    @property
    def num_choices(self) -> int:
        """Choices returned: those of the first prompt, then those of the second, ..."""
        return self.n * len(self.prompt.prompts) if isinstance(self.prompt, PromptList) else self.n


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability under the model's own distribution."""

    token_id: int
    text: str  # as it stands in the output, special tokens written out
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt, and how likely the model thought it where it stands."""

    token: TokenLogprob  # its logprob means nothing for the first one of a prompt
    rank: int  # 1: it was the most likely one; 0: the first token, which nothing foretells
    others: tuple[TokenLogprob, ...]  # the most likely ones without it, best first


@dataclass(slots=True)  # one per token: to make a frozen one takes twice as long
class TokenStep:
    """What one engine step added to one choice of a request, as text.

    `text` is safe to send: no half characters, no part of a stop string that may still complete.
    It can be empty, then the frame still keeps the token cadence. The last step of a request that was
    cancelled has no token.
    """

    token_id: int  # NO_TOKEN: there is none
    text: str
    full_text: str  # all text so far, for fullTextEnabled and final frames
    index: int  # tokens generated before
    latency_ms: float  # since arrival for the first token (prefill), since the last token otherwise
    batch_size: int
    queue_wait_us: int
    finish: FinishReason | None = None
    stop_reason: str | int | None = None  # the matched stop string or token id
    choice: int = 0  # index of the choice this step belongs to
    logprob: TokenLogprob | None = None  # of the chosen token, when sampling.logprobs >= 0
    top_logprobs: tuple[TokenLogprob, ...] = ()  # the sampling.logprobs most likely ones, best first
    prompt: Sequence[PromptToken] = ()  # with a choice's first step, when sampling.prompt_logprobs >= 0

    @property
    def num_tokens(self) -> int:
        """Generated so far, this step included."""
        return self.index if self.token_id == NO_TOKEN else self.index + 1

    @property
    def shown_id(self) -> str:
        """What stands between the brackets of a list of the step's ids."""
        return "" if self.token_id == NO_TOKEN else str(self.token_id)


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
    prompt: Sequence[PromptToken] = ()  # when sampling.prompt_logprobs >= 0
    pieces: Sequence[str] = ()  # of `text`, one per step


@dataclass(frozen=True, slots=True)
class ReplyContext:
    """What a reply may need besides the steps; known once the request has been admitted."""

    request_number: int  # counter over the life of the server: `endpoint_common_<n>`
    model: ModelInfo
    prompt_tokens: int  # of all prompts together
    prompt_text: str  # for return_full_text; of the first prompt, empty for token-id prompts
    full_text_frames: bool  # config fullTextEnabled
    prompt_ids: Sequence[int] = ()  # what the model is fed of the first prompt, for TGI's `prefill`
    echoes: Sequence[str] = ()  # the text of each prompt, when request.echo
    prompt_lengths: Sequence[int] = ()  # tokens of each prompt
    opening: Opening = Opening.NOBODY  # who begins the reasoning, when request.reasoning
    cached_tokens: Callable[[], Sequence[int]] = lambda: ()  # of each prompt, once it has its first token


class Reply(Protocol):
    """Formats the answer of one request. Made by `ProtocolAdapter.reply`, used by one handler only."""

    is_sse: bool  # its frames are server-sent events

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

        `completions`: the `request.num_choices` choices in the order in which they are returned, then the
        candidates that were not chosen, which only usage counts.
        """


class ProtocolAdapter(Protocol):
    """One dialect on its routes. Stateless: everything about a request lives in its Reply."""

    name: str
    family: str  # whose interface it is, for the documents
    routes: tuple[str, ...]  # POST paths on the business plane, aiohttp syntax
    body: RequestBody  # declares what `parse` reads

    def claims(self, body: Body) -> bool:
        """Whether this dialect understands the body, where two share a path."""

    def parse(self, body: Body, model: ModelInfo, path: Mapping[str, str]) -> GenerationRequest:
        """Check the body and resolve every default.

        Raises InvalidRequest (or NotFound for a wrong model in the path) with a text that names
        the field, its value, the legal range and what to do.
        """

    def reply(self, request: GenerationRequest, body: Body, context: ReplyContext) -> Reply: ...
