"""Everything in the endpoint that could grow: how full it is, where it ends, and how often it has refused.

What a full one does is in the table of docs/operations.md; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from engine.errors import EngineBug

# The names are label values of /metrics, hence a closed set. Whoever adds one adds its row to the table.
BoundName = Literal[
    "adapters",
    "connections",
    "grammar_cache_bytes",
    "grammar_trials",
    "kv_blocks",
    "log_queue",
    "prompt_ring",
    "requests_running",
    "requests_waiting",
    "token_ring",
    "tokenizer_queue",
    "waiting_tokens",
]


@dataclass(frozen=True, slots=True)
class Bound:
    name: BoundName
    used: Callable[[], float]  # now, in the unit of the limit
    limit: Callable[[], float]  # > 0
    refused: Callable[[], float] | None  # how often since the start; None where nothing is refused, but waits


class Bounds:
    """The registry. Its readers are called when /metrics is asked for, so they must be quick."""

    def __init__(self) -> None:
        self._bounds: dict[BoundName, Bound] = {}

    def register(
        self,
        name: BoundName,
        used: Callable[[], float],
        limit: float | Callable[[], float],
        refused: Callable[[], float] | None = None,
    ) -> None:
        """`limit`: a function where it can change. `refused`: counts what was turned away since the start."""
        if name in self._bounds:
            raise EngineBug(f"the bound {name} is registered already")
        read_limit = limit if callable(limit) else lambda: limit
        self._bounds[name] = Bound(name, used, read_limit, refused)

    def __iter__(self) -> Iterator[Bound]:
        return iter(self._bounds.values())
