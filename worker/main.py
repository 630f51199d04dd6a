"""Entry of an engine worker: load the model, size the cache, warm up, then the step loop until TERM."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import NoReturn

from engine.block_manager import BlockManager
from engine.core import EngineCore
from engine.mix import make_scheduler
from engine.swap_space import SwapSpace
from engine.wire.messages import EngineReady, Progress, Ready
from worker.context import WorkerContext
from worker.executor import LeaderExecutor
from worker.grammar import GrammarBook
from worker.links import open_link, watched
from worker.masks.client import MaskClient
from worker.masks.keeper import Vocabulary
from worker.runner import ModelRunner
from worker.sampler import Sampler

log = logging.getLogger("llm.worker")

_LEAST_SLOTS = 1024  # answers with a grammar, those that have been preempted included


def run_worker(given: WorkerContext) -> NoReturn:
    """Serve one model instance; SIGTERM ends the process by default action, nothing needs tidying."""
    control, wire = given.control.channel, given.wire

    def progress(phase: str, fraction: float) -> None:
        reads = runner.weight_bytes if phase == "weights" else 0
        control.send(Progress(wire.instance, phase, fraction, reads))

    start = time.monotonic()
    runner = ModelRunner(
        given.model, given.schedule, given.device, progress, given.num_workers, given.keepsake
    )
    runner.load()
    vocabulary = Vocabulary(
        given.model.weight_path, given.model.trust_remote_code, runner.vocab_size, runner.eos_token_ids
    )
    grammars = GrammarBook(MaskClient(vocabulary, slots=max(_LEAST_SLOTS, 4 * given.schedule.max_batch_size)))
    num_blocks = runner.size_kv_cache()
    runner.allocate(num_blocks)
    runner.warm_up()

    max_seq_len = runner.max_seq_len
    schedule = replace(
        given.schedule, max_seq_len=max_seq_len, enough_prefill_tokens=runner.enough_prefill_tokens
    )

    def greeting() -> EngineReady:
        return EngineReady(
            instance=wire.instance,
            vocab_size=runner.vocab_size,
            max_prompt_tokens=min(schedule.max_input_len, max_seq_len - 1),
            max_seq_len=max_seq_len,
            num_blocks=num_blocks,
            device=runner.device_name,
            dtype=str(runner.dtype).removeprefix("torch."),
            adapters=tuple(runner.adapters.loaded()),
        )

    blocks = BlockManager(num_blocks, schedule.block_size, prefix_cache=schedule.prefix_cache)
    core = EngineCore(
        wire.instance,
        make_scheduler(schedule, blocks, runner.eos_token_ids, SwapSpace(runner.num_host_blocks)),
        LeaderExecutor(runner, Sampler(runner.vocab_size, runner.eos_token_ids, grammars)),
        open_link(given, greeting),
        watched(given),
        adapters=runner.adapters,
    )
    control.send(
        Ready(
            f"{given.model.name} in {str(runner.dtype).removeprefix('torch.')}, "
            f"weights {runner.weight_bytes / 2**20:.1f} MiB, "
            f"{num_blocks} blocks of {schedule.block_size} tokens "
            f"({num_blocks * runner.block_bytes / 2**20:.1f} MiB), {time.monotonic() - start:.1f} s"
        )
    )
    core.run()
