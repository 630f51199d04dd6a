"""Which instance a request goes to: where it and those beside it have least to compute.

Costs are counted in tokens. A prompt costs those that the instance's prefix cache does not seem to hold, an
answer under way about its length. What an instance has cached is not asked but remembered: what it was sent
since it came up, as far as its cache reaches. Being wrong about that costs time and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from endpoint.flights import Part
    from endpoint.instance_link import InstanceLink

# What an answer counts: beside it every row is slower by about a token per step, for as long as it gets. The
# less it is, the longer a prefix that everybody has keeps everybody in one instance.
ROW_TOKENS = 256


@dataclass(slots=True)
class Burden:
    """What one instance has been given and not finished, and what its prefix cache should hold."""

    owed_tokens: int = 0  # of prompts, to be computed before their first token
    rows: int = 0  # answers, running or waiting
    turn: int = 0  # when it was last chosen, in choices
    _blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)  # by digest, longest unused first

    def known_blocks(self, digests: Sequence[int]) -> int:
        """How many of the first of `digests` it should hold."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, digests))

    def remember(self, digests: Iterable[int], most: int) -> None:
        """It is about to hold them. `most`: blocks of its cache."""
        for digest in digests:
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > most:
            self._blocks.popitem(last=False)

    def forget_blocks(self) -> None:
        """Another process has taken its place, with an empty cache."""
        self._blocks.clear()


@dataclass(slots=True)
class Place:
    """What one part adds to the burden of the instance it is in, or on its way to."""

    burden: Burden
    owed_tokens: int
    rows: int

    def note_begun(self) -> None:
        """Its first token has come."""
        self.burden.owed_tokens -= self.owed_tokens
        self.owed_tokens = 0

    def leave(self) -> None:
        self.note_begun()
        self.burden.rows -= self.rows
        self.rows = 0


class _Offer(NamedTuple):
    """Of one instance; the smallest wins."""

    waits: bool  # it has no room: the request would wait there, or push another out
    cost: int  # tokens
    turn: int  # so that equals take turns, and caches hold different things


class InstanceChoice:
    """The rule, and the numbers of the configuration it needs."""

    def __init__(self, block_size: int, max_batch_size: int, *, prefix_cache: bool) -> None:
        """`block_size`: tokens that a prefix cache shares as a whole. `max_batch_size`: rows of a step."""
        self._block_size = block_size
        self._max_rows = max_batch_size
        self._prefix_cache = prefix_cache
        self._turns = count(1)

    def choose(self, links: Sequence[InstanceLink], part: Part) -> tuple[InstanceLink, Place] | None:
        """The instance to send `part` to, and the place it has there from now on; None: no instance serves.

        The place is to be left when the part is not sent, or ends.
        """
        serving = [link for link in links if link.serving]
        if not serving:
            return None
        if part.digests is None:
            part.digests = self._digests(part) if self._prefix_cache and len(links) > 1 else ()
        chosen = min(serving, key=lambda link: self._offer(link, part)) if len(serving) > 1 else serving[0]
        burden = chosen.burden
        place = Place(burden, self._missing(burden, part), part.flight.branches)
        burden.owed_tokens += place.owed_tokens
        burden.rows += place.rows
        burden.turn = next(self._turns)
        burden.remember(part.digests, chosen.total_blocks)
        return chosen, place

    def _offer(self, link: InstanceLink, part: Part) -> _Offer:
        burden, missing = link.burden, self._missing(link.burden, part)
        # told up to a second ago: what has been sent since then is among what is owed
        room = link.free_blocks * self._block_size - burden.owed_tokens
        return _Offer(
            burden.rows + part.flight.branches > self._max_rows or missing > room,
            burden.owed_tokens + missing + burden.rows * ROW_TOKENS,
            burden.turn,
        )

    def _missing(self, burden: Burden, part: Part) -> int:
        """Tokens of the part that the instance would have to compute before the next one of its answer."""
        return part.num_tokens - burden.known_blocks(part.digests or ()) * self._block_size

    def _digests(self, part: Part) -> tuple[int, ...]:
        """Of the whole blocks of its prompt, each of all tokens up to its end: what may be shared is equal.

        The last token is always computed. Python's hash is keyed by a secret of this process.
        """
        params, size = part.sampling, self._block_size
        digest = hash((part.cache_salt, params.reproducible, params.lora))
        digests = []
        for start in range(0, len(part.prompt) - size, size):
            digest = hash((digest, part.prompt[start : start + size].tobytes()))
            digests.append(digest)
        return tuple(digests)
