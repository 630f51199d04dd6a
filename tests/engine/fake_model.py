"""A model whose every answer depends on all it reads from the cache: one wrong block, and it differs."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from engine.block_manager import BlockManager
from engine.executor import Sampled
from engine.mix import make_scheduler
from engine.outcome import FinishCode, Outcome
from engine.plan import StepPlan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceGroup
from engine.settings import ScheduleSettings
from engine.swap_space import SwapSpace

EOS = 7
VOCAB = 8
BLOCK = 4
LIMITS = ScheduleSettings(
    block_size=BLOCK,
    max_prefill_batch_size=4,
    max_prefill_tokens=64,
    max_batch_size=6,
    max_iter_times=32,
    max_queue_delay_us=500,
    max_first_token_wait_ms=2500,
    max_n=3,
    max_seq_len=64,
    max_input_len=48,
    truncation="off",
)
TEXTS = tuple(tuple(int(id) for id in np.random.default_rng(seed).integers(1, 100, 40)) for seed in range(2))
_PRIME = (1 << 61) - 1
_NEVER = 5000  # steps after which a schedule will not end any more


def _mix(before: int, token: int) -> int:
    return (before * 1_000_003 + token * 7919 + 12345) % _PRIME


class FakeModel:
    """Holds for each slot of the cache what its token and all before it have made of it."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self._block_size = block_size
        self._kv = np.zeros((num_blocks, block_size), np.int64)
        self._host = np.zeros((num_host_blocks, block_size), np.int64)

    def run(self, plan: StepPlan) -> Sampled:
        """Compute the plan; reproducible rows are made of other numbers than those that are not."""
        for block, host in plan.swap_out:
            self._host[host] = self._kv[block]
        for host, block in plan.swap_in:
            self._kv[block] = self._host[host]
        if plan.copies:
            sources, destinations = (list(blocks) for blocks in zip(*plan.copies, strict=True))
            self._kv[destinations] = self._kv[sources]
        values = [self._row(plan, row) for row in range(plan.num_rows)]
        rows = range(plan.num_rows) if plan.sample_rows is None else plan.sample_rows.tolist()
        own = [_mix(values[row], seq.branch + 1) for row, seq in zip(rows, plan.samples, strict=True)]
        beams = [values[row] for row in rows]
        tokens = np.array([value // 7 % VOCAB for value in own], np.int32)
        if not any(seq.params.beam_search for seq in plan.samples):
            return Sampled(tokens)
        gains = -np.array([[_mix(value, id) // 7 % 997 for id in range(VOCAB)] for value in beams]) / 100.0
        ids = np.argsort(-gains, axis=1, kind="stable").astype(np.int32)
        logprobs = np.take_along_axis(gains, ids, axis=1).astype(np.float32)
        return Sampled(tokens, logprobs[:, 0], ids, logprobs)

    def _row(self, plan: StepPlan, row: int) -> int:
        seq = plan.sequences[row]
        start, end = plan.query_start[row], plan.query_start[row + 1]
        value = self._root(seq)
        for position in range(int(plan.context_len[row])):
            block = plan.block_table[row, position // self._block_size]
            at = start + position - (plan.context_len[row] - (end - start))
            if at >= start:
                value = _mix(value, int(plan.input_ids[at]))
                assert plan.positions[at] == position
                slot = divmod(int(plan.slot_mapping[at]), self._block_size)
                assert slot == (block, position % self._block_size)
                assert position >= seq.num_known or seq.tokens[position] == plan.input_ids[at]
                self._kv[slot] = value
            else:
                value = int(self._kv[block, position % self._block_size])
        return value

    @staticmethod
    def _root(seq: Sequence) -> int:
        return _mix(sum(seq.cache_salt), 1 + seq.params.reproducible)


@dataclass(frozen=True)
class Ask:
    """A request, and in which turn it comes."""

    prompt: tuple[int, ...]
    max_tokens: int = 4
    branches: int = 1
    beam_search: bool = False
    reproducible: bool = False
    ignore_eos: bool = True
    salt: bytes = b""
    turn: int = 0
    hangs_up: int = 0  # so many turns later its client is gone; 0: it stays
    gone: int | None = None  # the branch nobody wants any more; None: all

    def group(self, request_id: int, now: float) -> SequenceGroup:
        params = SamplingParams(
            self.max_tokens,
            branches=self.branches,
            beam_search=self.beam_search,
            reproducible=self.reproducible,
            ignore_eos=self.ignore_eos,
        )
        ids = np.array(self.prompt, np.int32)
        return SequenceGroup(request_id, ids, params, now=now, cache_salt=self.salt)


def asks(texts: Seq[tuple[int, ...]]) -> st.SearchStrategy[Ask]:
    """Requests whose prompts are beginnings of these texts, each of 40 tokens or more."""

    def settled(ask: Ask) -> Ask:
        if ask.branches == 1:
            ask = replace(ask, beam_search=False, gone=None)
        return replace(ask, hangs_up=0) if ask.beam_search else ask  # beams depend on each other

    return st.builds(
        Ask,
        prompt=st.builds(lambda text, length: text[:length], st.sampled_from(texts), st.integers(1, 40)),
        max_tokens=st.integers(1, 12),
        branches=st.sampled_from((1, 1, 1, 2, 3)),
        beam_search=st.booleans(),
        reproducible=st.booleans(),
        ignore_eos=st.booleans(),
        salt=st.sampled_from((b"", b"a")),
        turn=st.integers(0, 25),
        hangs_up=st.sampled_from((0, 0, 0, 1, 2, 3, 5)),
        gone=st.sampled_from((None, 0, 1)),
    ).map(settled)


def same(got: dict[int, list[list[int]]], want: dict[int, list[list[int]]], asks: Seq[Ask]) -> bool:
    """Whether every branch was told what it should have been, as long as somebody wanted it."""
    return all(
        told == whole[: len(told)]
        and (len(told) == len(whole) or (ask.hangs_up > 0 and ask.gone in (None, branch)))
        for number, ask in enumerate(asks)
        for branch, (told, whole) in enumerate(zip(got[number], want[number], strict=True))
    )


class Machine:
    """A scheduler, its blocks and the model; proves their invariants after every step."""

    def __init__(self, limits: ScheduleSettings, num_blocks: int, num_host_blocks: int = 0) -> None:
        self.blocks = BlockManager(num_blocks, limits.block_size, prefix_cache=limits.prefix_cache)
        self.scheduler = make_scheduler(limits, self.blocks, [EOS], SwapSpace(num_host_blocks))
        self.model = FakeModel(num_blocks, limits.block_size, num_host_blocks)
        self.now = 0.0
        self.answers: dict[int, list[list[int]]] = {}  # by request: what each branch was told
        self.cached: dict[int, int] = {}
        self.plans: list[StepPlan] = []

    def add(self, request_id: int, ask: Ask) -> None:
        self.answers[request_id] = [[] for _ in range(ask.branches)]
        self.scheduler.add(ask.group(request_id, self.now))

    def turn(self) -> StepPlan | None:
        self.now += 0.01
        plan = self.scheduler.schedule(self.now)
        assert not self.scheduler.take_refused()
        if plan is None:
            return None
        self.inspect(plan)
        self.note(self.scheduler.commit(plan, self.model.run(plan), self.now))
        self.scheduler.check()
        return plan

    def inspect(self, plan: StepPlan) -> None:
        """What holds of every plan, before it is computed."""
        self.plans.append(plan)
        assert len(set(plan.slot_mapping.tolist())) == plan.num_tokens
        written = set((plan.slot_mapping // self.blocks.block_size).tolist())
        assert not any(map(self.blocks.is_known, written)), "others may find what is written"
        for block in written:  # branches of a prompt may share it in the very step that computes it
            owners = {
                group.request_id
                for group in self.scheduler.running
                for seq in group.sequences
                if block in seq.block_table
            }
            assert len(owners) == 1, "a block is both shared and written"

    def note(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.finish is not FinishCode.ERROR
            self.answers[outcome.request_id][outcome.branch].append(outcome.token)
            self.cached[outcome.request_id] = outcome.cached_tokens

    def serve(self, asks: Iterable[Ask]) -> dict[int, list[list[int]]]:
        """Every request to its end."""
        waiting = sorted(enumerate(asks), key=lambda entry: entry[1].turn)
        leaving = [(ask.turn + ask.hangs_up, number, ask.gone) for number, ask in waiting if ask.hangs_up]
        for turn in range(_NEVER):
            while waiting and waiting[0][1].turn <= turn:
                self.add(*waiting.pop(0))
            for _, number, branch in (each for each in leaving if each[0] == turn):
                self.scheduler.abort(number, branch)
                self.scheduler.check()
            self.turn()
            if not waiting and not self.scheduler.has_work:
                break
        assert not self.scheduler.has_work
        assert self.blocks.num_free == self.blocks.num_blocks
        assert self.scheduler.swap.num_free == self.scheduler.swap.num_blocks
        return self.answers
