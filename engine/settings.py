"""The frozen slices that daemon/config.py cuts config.json into.

They live at the bottom of the import order because every process receives some of them. Each class
is given the slice, or the few numbers, it needs; nobody writes a result back into one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ASYNC_SCHEDULING = "MINDIE_ASYNC_SCHEDULING_ENABLE"  # the environment variable, as texts name it

Plane = Literal["business", "management", "metrics"]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Certificate material of one listener; all paths absolute."""

    ca_files: tuple[Path, ...]
    cert_file: Path
    key_file: Path
    key_password_file: Path | None
    crl_files: tuple[Path, ...]  # empty: no revocation check


@dataclass(frozen=True, slots=True)
class Listener:
    """One bound address and the planes it serves."""

    planes: tuple[Plane, ...]
    address: str  # IPv4 or IPv6 literal without brackets
    port: int
    tls: TlsFiles | None  # None: plain HTTP


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """What one connection may take, and how long. All seconds are on the monotonic clock."""

    max_connections: int = 0  # over all planes; 0: min(10000, 80 % of the descriptors)
    handshake_timeout_s: int = 10  # TLS, from accept
    head_timeout_s: int = 10  # from the connection, or from a request's first byte, to the end of its head
    body_timeout_s: int = 60  # from the end of the head to the end of the body
    keep_alive_s: int = 75  # from an answer's end to the first byte of the next request
    write_stall_s: int = 60  # while the client accepts no byte
    allowed_hosts: tuple[str, ...] = ()  # names of a reverse proxy, for control routes


@dataclass(frozen=True, slots=True)
class ApiKeySettings:
    """A key that clients show, and its own limits; 0: none beside those of the server."""

    name: str
    sha256: bytes = field(repr=False)  # 32 bytes, of the key's text
    max_running: int = 0  # requests served at once
    max_queued: int = 0  # requests waiting
    tokens_per_minute: int = 0  # prompt and generated tokens


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    listeners: tuple[Listener, ...]
    max_link_num: int  # requests served at once; twice as many may wait
    max_request_bytes: int
    max_json_depth: int
    full_text: bool  # stream frames carry all text so far instead of the increment
    openai_flavour: Literal["vllm", "openai"]
    token_timeout_s: int  # longest wait for the next token
    e2e_timeout_s: int  # longest time from arrival to the last token
    tokenizer_threads: int
    metrics_enabled: bool
    npu_usage_threshold: int = 0  # per cent: a device so busy may miss a health check's token; 0: no checks
    connections: ConnectionSettings = ConnectionSettings()
    api_keys: tuple[ApiKeySettings, ...] = ()  # none: everybody may ask
    max_waiting_tokens: int = 0  # of prompts without a first token; 0: 4 x the tokens of the cache


@dataclass(frozen=True, slots=True)
class MixSettings:
    """templateType Mix: prompts are computed in pieces beside what decodes."""

    chunk_size: int  # tokens of a prompt per step; 0: as many as the decoding rows can bear
    max_partial: int  # prompts that are partly computed at once
    long_threshold: int  # tokens from which on a prompt is a long one
    max_long_partial: int  # long ones among `max_partial`


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """Limits of the scheduler after the silent adjustments of config.md section 8."""

    block_size: int  # tokens per KV block
    max_prefill_batch_size: int  # sequences per prefill step
    max_prefill_tokens: int  # prompt tokens per prefill step
    max_batch_size: int  # sequences per decode step
    max_iter_times: int  # cap on output tokens of any request
    max_queue_delay_us: int  # longest wait for a fuller prefill batch
    max_first_token_wait_ms: int  # after this wait a new request may preempt a running one
    max_n: int
    max_seq_len: int  # prompt + output tokens
    max_input_len: int  # effective prompt limit: min(maxInputTokenLen, maxSeqLen - 1)
    truncation: Literal["off", "keep_head", "keep_tail"]
    prefix_cache: bool = False  # prompts reuse the blocks of earlier ones that begin alike
    guess_length: int = 0  # tokens of a sequence that speculative decoding guesses per step; 0: none
    max_preempt_count: int = 0  # requests swapped out per step; others that give way are computed again
    mix: MixSettings | None = None  # None: a step computes prompts or decodes
    async_scheduling: bool = False  # the next step is planned before the result of the last is there
    enough_prefill_tokens: int = 2**31  # several prompts share a prefill step up to here: the device's wish


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter that is loaded with the model."""

    name: str
    path: Path  # absolute


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Adapters loaded at the start, and what may be loaded while the server runs."""

    modules: tuple[LoraModule, ...] = ()
    max_loras: int = 0  # adapters loaded at once; 0: only `modules`
    max_rank: int = 0  # largest rank of any adapter; 0: any, but none at run time
    root: Path = Path("/")  # what relative paths of requests are relative to
    file_policy: Literal["warn", "refuse", "off"] = "warn"  # for files that others may write or own

    @property
    def dynamic(self) -> bool:
        """Whether adapters may come and go while the server runs."""
        return self.max_loras > 0 and self.max_rank > 0


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How the model's chats are read, as far as its own files do not say it."""

    reasoning: bool = False  # tell reasoning apart from the answer
    tool_call_parser: str = ""  # a name of endpoint.tools.registry; "" = what the template speaks
    template: Path | None = None  # absolute; None: the model's own


@dataclass(frozen=True, slots=True)
class ModelSettings:
    name: str
    weight_path: Path
    instance_type: Literal["Standard", "StandardMock"]
    device_type: Literal["auto", "npu", "cuda", "cpu"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    kv_cache_gib: int  # npuMemSize: -1 = automatic
    kv_cache_mib: int  # kvCacheMemMiB: > 0 replaces kv_cache_gib
    kv_block_num: int  # kvCacheBlockNum: > 0 wins over both
    memory_fraction: float  # NPU_MEMORY_FRACTION, used when sizing automatically on npu and cuda
    cpu_threads: int  # torch threads per worker; 0 = cores / workers
    trust_remote_code: bool
    ignore_eos: bool
    world_size: int
    cpu_mem_gib: int
    linear_dtype: Literal["auto", "fp8"] = "auto"  # of the layers' products; auto: dtype
    kv_cache_dtype: Literal["auto", "int8"] = "auto"  # auto: dtype, or int8 if the checkpoint asks for it
    batch_invariant: bool = False  # no answer depends on what else is computed, seeded or not
    moe_ep: int = 1  # groups of ranks that experts are dealt to whole; a divisor of world_size
    lora: LoraSettings = LoraSettings()
    chat: ChatSettings = ChatSettings()


@dataclass(frozen=True, slots=True)
class LogSettings:
    dynamic_level: str  # "" = level from the environment
    valid_hours: int
    valid_time: str


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything the parent knows. Children are handed the slices they need."""

    root: Path  # installation root
    config_file: Path
    endpoint: EndpointSettings
    schedule: ScheduleSettings
    model: ModelSettings
    log: LogSettings
    device_ids: tuple[tuple[int, ...], ...]  # one inner tuple per model instance
    worker_init_timeout_s: int
    step_timeout_s: int  # a child that shows no sign of life for longer is replaced
    graceful_stop_timeout_s: int
    ipc_dir: Path | None  # None: a private directory under the system's temporary directory
    warnings: tuple[str, ...]  # to be logged once the log is open
    notes: tuple[str, ...] = ()  # adjustments and overrides, to be logged as they are no fault
