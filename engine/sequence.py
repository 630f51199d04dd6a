"""One sequence of tokens, the group of sequences that answer one request, and the states of a group."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineBug
from engine.sampling_params import SamplingParams, branch_seed
from engine.wire.messages import ENDED, PROBE

if TYPE_CHECKING:
    from engine.beam import BeamSearch
    from engine.speculation import GuessLength

TokenArray = NDArray[np.int32]


class Sequence:
    """The tokens and the block table of one candidate answer.

    `tokens[:num_tokens]` is the prompt followed by the output so far. The first `num_computed` of them
    have keys and values in the cache; a running sequence always lacks exactly its newest token there.

    Where steps overlap (engine/lookahead.py) the newest token may be on its way still: `tokens[:num_known]`
    are there. Who plans steps reads and writes `num_tokens`, who computes them `num_known`.
    """

    __slots__ = (
        "block_digests",
        "block_table",
        "branch",
        "cache_salt",
        "cumulative_logprob",
        "ended",
        "guess_length",
        "num_computed",
        "num_known",
        "num_prompt",
        "num_published",
        "num_tokens",
        "num_told",
        "params",
        "progress",
        "request_id",
        "seed",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int,
        prompt: TokenArray,
        params: SamplingParams,
        *,
        branch: int = 0,
        cache_salt: bytes = b"",
    ) -> None:
        """`prompt`: int32 [n], n >= 1. `branch`: index among the sequences of the request.

        `cache_salt`: only with sequences of the same one may it share blocks.
        """
        self.request_id = request_id
        self.params = params
        self.branch = branch
        self.seed = branch_seed(params.seed, branch)
        self.num_prompt = len(prompt)
        self.num_tokens = self.num_known = len(prompt)
        # one allocation for the whole life: appending never copies
        self.tokens: TokenArray = np.empty(len(prompt) + params.max_tokens, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.num_computed = 0
        self.block_table: list[int] = []
        self.cache_salt = cache_salt
        self.block_digests: list[bytes] = []  # the prefix cache's, of its first full blocks
        self.num_published = 0  # blocks at the beginning of the table that the prefix cache has been told of
        self.cumulative_logprob = 0.0  # of the output; kept for beams only
        self.ended = False
        self.guess_length: GuessLength | None = None  # the scheduler's, where it guesses
        self.progress: object = None  # the sampler's: how far it has come in its grammar
        self.num_told = (
            0  # tokens of the prompt, after its first, that what the model thinks of is out already
        )

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def prompt_ids(self) -> TokenArray:
        return self.tokens[: self.num_prompt]

    @property
    def num_known_output(self) -> int:
        return self.num_known - self.num_prompt

    @property
    def output_ids(self) -> TokenArray:
        """As far as it is known."""
        return self.tokens[self.num_prompt : self.num_known]

    @property
    def owes_prompt_scores(self) -> bool:
        """Whether its prefill is still to tell what the model thinks of the prompt: once in a request."""
        return self.params.prompt_logprobs >= 0 and self.num_told < self.num_prompt - 1

    def append(self, token: int) -> None:
        self.learn(token)
        self.num_tokens = self.num_known

    def learn(self, token: int) -> None:
        """The token that follows those that are known; `num_tokens` may count it already."""
        self.tokens[self.num_known] = token
        self.num_known += 1

    def __repr__(self) -> str:  # never the tokens: they are the user's text
        return f"Sequence({self.request_id}.{self.branch}, {self.num_prompt}+{self.num_output} tokens)"


class GroupStatus(Enum):
    WAITING = "waiting"  # prompt (and, after preemption, its output so far) still to be prefilled
    RUNNING = "running"
    SWAPPED = "swapped"  # what it has computed is in the host's memory
    FINISHED = "finished"


_NEXT: dict[GroupStatus, set[GroupStatus]] = {
    GroupStatus.WAITING: {GroupStatus.RUNNING, GroupStatus.FINISHED},
    # but for the last these are preemptions
    GroupStatus.RUNNING: {GroupStatus.WAITING, GroupStatus.SWAPPED, GroupStatus.FINISHED},
    GroupStatus.SWAPPED: {GroupStatus.RUNNING, GroupStatus.FINISHED},
    GroupStatus.FINISHED: set(),
}


class SequenceGroup:
    """All sequences of one request: scheduled, preempted and resumed together.

    Until its first step only branch 0 is computed; the others then share its blocks.
    """

    __slots__ = (
        "_status", "arrival", "beam_search", "enqueued", "num_cached", "num_preemptions", "params",
        "prefilling", "priority", "rank", "request_id", "sequences", "stop_token_ids", "waited",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int,
        prompt: TokenArray,
        params: SamplingParams,
        *,
        priority: int = 5,
        now: float = 0.0,
        cache_salt: bytes = b"",
    ) -> None:
        """`prompt`: int32 [n], n >= 1. `priority`: 1 (first) .. 5, or PROBE. `now`: monotonic seconds.

        `cache_salt`: see Sequence.
        """
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.sequences = [
            Sequence(request_id, prompt, params, branch=i, cache_salt=cache_salt)
            for i in range(params.branches)
        ]
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.beam_search: BeamSearch | None = None  # the scheduler sets it
        self.arrival = now
        self.enqueued = now  # when the group last began to wait for a step
        self.waited = 0.0  # seconds between steps since it was last told a token, without those since then
        self.prefilling = False  # running, and its prompt (or output so far) comes in pieces
        self.rank = now  # place in the queues, smallest first; the scheduler sets it
        self.num_preemptions = 0
        self.num_cached = 0  # tokens of the prompt that its first prefill found in the prefix cache
        self._status = GroupStatus.WAITING

    @property
    def status(self) -> GroupStatus:
        return self._status

    def move(self, to: GroupStatus) -> None:
        if to not in _NEXT[self._status]:
            raise EngineBug(f"request {self.request_id}: {self._status.name} -> {to.name}")
        self._status = to

    def resume(self, outputs: Seq[int], ids: TokenArray) -> None:
        """Take up what another process has begun, as after a preemption.

        `outputs`: how many tokens each branch has already, ENDED for one that is over; () for a new request.
        `ids`: those tokens, one branch after the other.
        """
        start = 0
        for seq, count in zip(self.sequences, outputs, strict=bool(outputs)):
            seq.ended = count == ENDED
            if count > 0:
                seq.tokens[seq.num_prompt : seq.num_prompt + count] = ids[start : start + count]
                seq.num_tokens = seq.num_known = seq.num_prompt + count
                start += count
        if outputs:
            for seq in self.sequences:
                seq.num_told = seq.num_prompt - 1

    @property
    def is_probe(self) -> bool:
        return self.priority == PROBE

    @property
    def live(self) -> list[Sequence]:
        return [seq for seq in self.sequences if not seq.ended]

    @property
    def has_output(self) -> bool:
        """Whether it has run before; an ended branch has output too."""
        return any(seq.num_output for seq in self.sequences)

    def __repr__(self) -> str:
        return f"SequenceGroup({self.request_id}, {self._status.name}, {len(self.live)} live)"
