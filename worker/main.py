"""Entry of an engine worker: load the model, size the cache, warm up, then the step loop until TERM."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import NoReturn

from engine.block_manager import BlockManager
from engine.core import EngineCore
from engine.mix import make_scheduler
from engine.overlap import OverlappedCore
from engine.swap_space import SwapSpace
from engine.wire.messages import EngineReady, Progress, Ready
from worker.context import WorkerContext
from worker.executor import LeaderExecutor
from worker.follower import Follower
from worker.grammar import GrammarBook
from worker.links import open_link, step_receiver, step_sender, watched
from worker.masks.client import MaskClient
from worker.masks.keeper import Vocabulary
from worker.runner import ModelRunner
from worker.sampler import Sampler
from worker.shard import Shard
from worker.shared_adapters import SharedAdapters

log = logging.getLogger("llm.worker")

_LEAST_SLOTS = 1024  # answers with a grammar, those that have been preempted included


def run_worker(given: WorkerContext) -> NoReturn:
    """Serve one model instance, or compute a part of one.

    SIGTERM ends the process by default action, nothing needs tidying.
    """
    control, wire = given.control.channel, given.wire

    def progress(phase: str, fraction: float) -> None:
        if given.rank == 0:  # the others load as much at the same time
            reads = runner.weight_bytes if phase == "weights" else 0
            control.send(Progress(wire.instance, phase, fraction, reads))

    start = time.monotonic()
    runner = ModelRunner(
        given.model, given.schedule, given.device, progress, given.num_workers, given.keepsake
    )
    shard = Shard(given.rank, given.num_ranks, given.model.moe_ep)
    runner.join(shard, wire.meeting_file(given.generation), given.init_timeout_s)
    runner.load()
    num_blocks = runner.size_kv_cache()
    runner.allocate(num_blocks)
    runner.warm_up()
    if given.rank > 0:
        follower = Follower(runner, step_receiver(given), watched(given))
        control.send(Ready(_detail(given, runner, num_blocks, start)))
        follower.run()

    vocabulary = Vocabulary(
        given.model.weight_path, given.model.trust_remote_code, runner.vocab_size, runner.eos_token_ids
    )
    grammars = GrammarBook(MaskClient(vocabulary, slots=max(_LEAST_SLOTS, 4 * given.schedule.max_batch_size)))
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

    followers = step_sender(given)
    sampler = Sampler(runner.vocab_size, runner.eos_token_ids, grammars, runner.device_draw)
    blocks = BlockManager(num_blocks, schedule.block_size, prefix_cache=schedule.prefix_cache)
    core_class = partial(OverlappedCore, set_up_thread=runner.set_up_thread)
    core = (core_class if schedule.async_scheduling else EngineCore)(
        wire.instance,
        make_scheduler(schedule, blocks, runner.eos_token_ids, SwapSpace(runner.num_host_blocks)),
        LeaderExecutor(runner, sampler, followers),
        open_link(given, greeting),
        watched(given),
        adapters=runner.adapters
        if followers is None
        else SharedAdapters(runner.adapters, followers, runner.group),
    )
    control.send(Ready(_detail(given, runner, num_blocks, start)))
    core.run()


def _detail(given: WorkerContext, runner: ModelRunner, num_blocks: int, start: float) -> str:
    """What this worker holds, for the log."""
    part = f" (rank {given.rank} of {given.num_ranks})" if given.num_ranks > 1 else ""
    return (
        f"{given.model.name} in {str(runner.dtype).removeprefix('torch.')}{part}, "
        f"weights {runner.weight_bytes / 2**20:.1f} MiB, "
        f"{num_blocks} blocks of {given.schedule.block_size} tokens "
        f"({num_blocks * runner.block_bytes / 2**20:.1f} MiB), {time.monotonic() - start:.1f} s"
    )
