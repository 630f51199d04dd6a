"""Blocks in the host's memory, where a preempted group keeps what it has computed until it comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.block_manager import BlockManager
from engine.errors import EngineBug
from engine.sequence import Sequence, SequenceGroup

Moves = list[tuple[int, int]]  # (source, destination)


class SwapSpace:
    """Who keeps what in which host block. What branches share they share here too.

    Moves are collected and made before the next step: first all that go out, for their blocks may be written
    by that step, then all that come in.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[SequenceGroup, dict[Sequence, list[int]]] = {}
        self._out: Moves = []  # device block, host block
        self._in: Moves = []  # host block, device block

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take_moves(self) -> tuple[Moves, Moves]:
        """Those out of the cache, and those into it, to be made before the step that is about to run."""
        moves = self._out, self._in
        self._out, self._in = [], []
        return moves

    def put(self, group: SequenceGroup, blocks: BlockManager) -> bool:
        """Move the group out of the cache; False, and no change, when there is no room for it."""
        tables = {seq: seq.block_table[: blocks.blocks_for(seq.num_computed)] for seq in group.live}
        places = dict.fromkeys(block for table in tables.values() for block in table)
        if len(places) > len(self._free):
            return False
        hosts = {block: self._free.pop() for block in places}
        # a copy that has not been made yet is still where it comes from
        self._out += [(blocks.content_of(block), host) for block, host in hosts.items()]
        self._tables[group] = {seq: [hosts[block] for block in table] for seq, table in tables.items()}
        for seq in group.sequences:
            blocks.release(seq)
        return True

    def needs(self, group: SequenceGroup, blocks: BlockManager) -> int:
        """Blocks of the cache that it takes to come back and compute its next tokens."""
        tables = self._live_tables(group)
        written = Counter(
            table[index]
            for seq, table in tables.items()
            if (index := seq.num_computed // blocks.block_size) < len(table)
        )
        distinct = {host for table in tables.values() for host in table}
        more = sum(blocks.blocks_for(seq.num_tokens) - len(table) for seq, table in tables.items())
        return len(distinct) + more + sum(count - 1 for count in written.values())

    def fetch(self, group: SequenceGroup, blocks: BlockManager) -> None:
        """Move the group back into the cache, which has to have room."""
        self._in += blocks.arrange(self._live_tables(group)).items()
        self.drop(group)

    def drop(self, group: SequenceGroup) -> None:
        """Forget what the group keeps here, if it keeps anything."""
        tables = self._tables.pop(group, {})
        self._free += dict.fromkeys(host for table in tables.values() for host in table)

    def check(self, groups: Iterable[SequenceGroup]) -> None:
        """Prove that every block is free or kept by one of `groups`. Raises EngineBug."""
        kept = [{host for table in tables.values() for host in table} for tables in self._tables.values()]
        if set(self._tables) != set(groups):
            raise EngineBug("swap space: it keeps blocks of others than the swapped groups")
        if sorted([*self._free, *(host for hosts in kept for host in hosts)]) != list(range(self.num_blocks)):
            raise EngineBug(f"swap space: {len(self._free)} free + {kept} of {self.num_blocks}")

    def _live_tables(self, group: SequenceGroup) -> dict[Sequence, list[int]]:
        return {seq: table for seq, table in self._tables[group].items() if not seq.ended}
