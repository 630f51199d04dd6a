"""Every message between processes. Few, frozen, and with units; knowing them is knowing the system.

Arrays of numbers do not travel here but on the rings (ring.py, layout.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.sampling_params import SamplingParams

PROBE = 0  # priority of our own question whether the engine still makes tokens; no client can ask for it


@dataclass(frozen=True, slots=True)
class Submit:
    """endpoint -> leader. Its ids lie on the prompt ring already, in the same order: prompt, outputs."""

    request_id: int  # unique for the life of the endpoint process
    num_prompt_tokens: int
    priority: int  # 1 (first) .. 5 (last), or PROBE
    outputs: tuple[
        int, ...
    ]  # of each branch: tokens it has already, ENDED for one without further ones; or ()
    cache_salt: bytes  # only prompts of the same one may share what the prefix cache holds
    sampling: SamplingParams


ENDED = -1  # in Submit.outputs


@dataclass(frozen=True, slots=True)
class Abort:
    """endpoint -> leader. No further rows are wanted; unknown ids are fine."""

    request_id: int
    branch: int  # -1: the whole request


@dataclass(frozen=True, slots=True)
class LoraLoad:
    """endpoint -> leader. Answered by LoraDone once requests may use the adapter, or never will."""

    name: str
    path: str  # of its directory, absolute


@dataclass(frozen=True, slots=True)
class LoraUnload:
    """endpoint -> leader. Answered by LoraDone once the last request that uses it has ended."""

    name: str


@dataclass(frozen=True, slots=True)
class EngineReady:
    """leader -> endpoint, first on every link: what this instance can take."""

    instance: int
    vocab_size: int
    max_prompt_tokens: int
    max_seq_len: int
    num_blocks: int
    device: str  # "cpu", "cuda" or "npu"
    dtype: str  # "bfloat16", ...
    adapters: tuple[tuple[str, str], ...] = ()  # name and directory of those it has


@dataclass(frozen=True, slots=True)
class EngineStats:
    """leader -> endpoint, when work begins, once a second while there is some, and when it ends."""

    instance: int
    waiting: int
    running: int
    swapped: int
    preemptions: int  # since start
    free_blocks: int
    prefix_tokens: int  # of prompts, looked up in the prefix cache since start
    prefix_hits: int  # of them, found there
    guessed_tokens: int  # by speculative decoding since start
    right_guesses: int  # of them, what the model said
    host_blocks: int  # for swapped requests
    free_host_blocks: int


@dataclass(frozen=True, slots=True)
class LoraDone:
    """leader -> endpoint: what became of the last LoraLoad or LoraUnload of this name."""

    name: str
    error: str  # for the client; "" when it is done


@dataclass(frozen=True, slots=True)
class Progress:
    """worker -> parent -> endpoint: how far loading has come."""

    instance: int
    phase: str
    fraction: float  # 0..1 of this phase
    total_bytes: int  # of what this phase reads; 0: it is not measured in bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """child -> parent, before anything else: messages to this process arrive from now on."""


@dataclass(frozen=True, slots=True)
class Ready:
    """child -> parent: this process can serve."""

    detail: str  # for the log


@dataclass(frozen=True, slots=True)
class Fatal:
    """child -> parent, best effort before exit: why this process cannot go on."""

    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """endpoint -> parent: an operator asked for the end of the service over HTTP."""

    drain_s: float  # how long running requests may still take


@dataclass(frozen=True, slots=True)
class Drain:
    """parent -> endpoint: refuse new requests, let running ones end, then exit."""

    deadline_s: float


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """parent -> endpoint: what config.json may change while the service runs, all of it as it is now."""

    openai_flavour: str  # "vllm" or "openai"
    token_timeout_s: int
    e2e_timeout_s: int
    max_link_num: int
    max_waiting_tokens: int
    api_keys: tuple[tuple[str, bytes, int, int, int], ...]  # the fields of ApiKeySettings
    reload_certificates: bool  # read the files of the listeners again


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """parent -> endpoint: this instance is dead. Answered by Quiet."""

    instance: int
    reason: str
    final: bool  # it does not come back: its requests end with an error


@dataclass(frozen=True, slots=True)
class InstanceUp:
    """parent -> endpoint: this instance's link begins (anew); its leader greets on it when it is ready."""

    instance: int
    generation: int  # of the link: part of its addresses, and of every record on its rings


@dataclass(frozen=True, slots=True)
class EndpointDown:
    """parent -> leader: nobody waits for your requests any more. Answered by Quiet."""


@dataclass(frozen=True, slots=True)
class EndpointUp:
    """parent -> leader: the link to the new endpoint begins."""

    generation: int


@dataclass(frozen=True, slots=True)
class Quiet:
    """survivor -> parent: my end of this link is closed; its rings may be reset."""

    instance: int
    generation: int


@dataclass(frozen=True, slots=True)
class Linked:
    """endpoint -> parent: this instance has greeted, and takes requests (again)."""

    instance: int
    generation: int


Message = (
    Submit
    | Abort
    | LoraLoad
    | LoraUnload
    | EngineReady
    | EngineStats
    | LoraDone
    | Progress
    | Hello
    | Ready
    | Fatal
    | StopRequested
    | Drain
    | InstanceDown
    | InstanceUp
    | EndpointDown
    | EndpointUp
    | Quiet
    | Linked
    | Reconfigure
)
