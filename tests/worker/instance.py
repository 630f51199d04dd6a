"""A whole model instance in the process of the test: scheduler, sampler and a runner for each rank.

The ranks are threads, joined by a `ThreadGroup`; what the leader tells the others goes over real rings.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from tokenizers import Tokenizer

from engine.adapters import AdapterDesk
from engine.block_manager import BlockManager
from engine.core import Watched
from engine.mix import make_scheduler
from engine.outcome import FinishCode
from engine.plan import StepPlan
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceGroup
from engine.settings import ModelSettings, ScheduleSettings
from engine.step_channel import StepReceiver, StepSender
from engine.swap_space import SwapSpace
from engine.wire import sizes
from engine.wire.channel import Channel
from engine.wire.keepsake import Keepsake
from engine.wire.messages import LoraDone, LoraLoad, LoraUnload
from engine.wire.ring import RingReader, RingWriter, create_ring
from engine.wire.vitals import Vitals
from tests.worker.ranks import on_ranks
from worker.executor import LeaderExecutor
from worker.follower import Follower
from worker.grammar import GrammarBook
from worker.masks.client import MaskClient
from worker.masks.keeper import Vocabulary
from worker.parallel import ParallelGroup
from worker.runner import ModelRunner
from worker.sampler import Sampler
from worker.shared_adapters import SharedAdapters

T = TypeVar("T")
_keepsake = Keepsake()  # all runs have the same kernels
_numbers = itertools.count()
_FOLLOWER_TURN_S = 0.2


class Instance:
    """The leader's side, driven by hand: requests in, turns, the tokens told so far."""

    def __init__(
        self,
        runner: ModelRunner,
        folder: Path,
        schedule: ScheduleSettings,
        num_blocks: int,
        followers: StepSender | None,
        masks: MaskClient,
    ) -> None:
        """`folder`: of the model."""
        blocks = BlockManager(num_blocks, schedule.block_size, prefix_cache=schedule.prefix_cache)
        swap = SwapSpace(runner.num_host_blocks)
        self.scheduler = make_scheduler(schedule, blocks, runner.eos_token_ids, swap)
        self.plans: list[StepPlan] = []
        self.told: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # by request and branch
        self.adapters_done: list[LoraDone] = []
        sampler = Sampler(runner.vocab_size, runner.eos_token_ids, GrammarBook(masks), runner.device_draw)
        self._executor = LeaderExecutor(runner, sampler, followers)
        store = runner.adapters
        self._desk = AdapterDesk(
            store if followers is None else SharedAdapters(store, followers, runner.group),
            self.scheduler,
            self.adapters_done.append,
        )
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ask(self, request_id: int, prompt: str, max_tokens: int = 24, **sampling: object) -> None:
        params = SamplingParams(max_tokens, **sampling)  # type: ignore[arg-type]
        ids = np.array(self._tokenizer.encode(prompt).ids, np.int32)
        assert self._desk.serves(params.lora)
        self.scheduler.add(SequenceGroup(request_id, ids, params, now=time.monotonic()))

    def turn(self) -> None:
        self._desk.settle()
        plan = self.scheduler.schedule(time.monotonic())
        assert not self.scheduler.take_refused()
        if plan is None:
            return
        self.plans.append(plan)
        for outcome in self.scheduler.commit(plan, self._executor.run(plan), time.monotonic()):
            assert outcome.finish is not FinishCode.ERROR, outcome
            if not outcome.rank:
                self.told[outcome.request_id, outcome.branch].append(outcome.token)
        self.scheduler.check()

    def serve(self) -> dict[tuple[int, int], list[int]]:
        """All requests to their ends; the tokens of all so far."""
        while self.scheduler.has_work:
            self.turn()
        return dict(self.told)

    def text(self, request_id: int) -> str:
        return str(self._tokenizer.decode(self.told[request_id, 0]))

    def load_adapter(self, name: str, path: str) -> None:
        """Returns once it is in force; steps go on meanwhile."""
        self._desk.receive(LoraLoad(name, path))
        self._until_done(name)

    def unload_adapter(self, name: str) -> None:
        """Returns once nobody uses it any more; steps go on meanwhile."""
        self._desk.receive(LoraUnload(name))
        self._until_done(name)

    def _until_done(self, name: str) -> None:
        done = len(self.adapters_done)
        while len(self.adapters_done) == done:
            self.turn()
        assert self.adapters_done[-1] == LoraDone(name, "")


def on_instance(
    size: int,
    model: ModelSettings,
    schedule: ScheduleSettings,
    num_blocks: int,
    scenario: Callable[[Instance], T],
) -> T:
    """What `scenario`, which ends with a step, returns for an instance of `size` ranks."""
    number = next(_numbers)
    rings = [
        create_ring(
            f"mindie_test_{os.getpid()}_ranks{number}.{rank}", sizes.STEP_SLOTS, sizes.STEP_SLOT_BYTES
        )
        for rank in range(1, size)
    ]
    over = threading.Event()

    adapters: list[set[str]] = []

    def work(group: ParallelGroup) -> T | None:
        runner = ModelRunner(model, schedule, 0, lambda phase, fraction: None, keepsake=_keepsake)
        runner.group = group
        runner.load()
        runner.allocate(num_blocks)
        if not group.shard.leads:
            records = StepReceiver(RingReader(rings[group.shard.rank - 1]))
            # it hears nothing from a parent
            watched = Watched(cast(Channel, None), Vitals(1).pulse(0), _FOLLOWER_TURN_S)
            follower = Follower(runner, records, watched)
            while not over.is_set():
                follower.step()
            adapters.append({name for name, _ in runner.adapters.loaded()})
            return None
        vocabulary = Vocabulary(model.weight_path, False, runner.vocab_size, runner.eos_token_ids)
        masks = MaskClient(vocabulary, slots=64)  # its processes end with the thread that starts them
        try:
            followers = StepSender([RingWriter(ring) for ring in rings], timeout_s=30.0) if rings else None
            found = scenario(Instance(runner, model.weight_path, schedule, num_blocks, followers, masks))
            adapters.append({name for name, _ in runner.adapters.loaded()})
            return found
        finally:
            over.set()
            masks.close()

    found = on_ranks(size, work)[0]
    assert found is not None
    assert len(adapters) == size and all(names == adapters[0] for names in adapters)
    return found
