"""Who owns which KV block, with reference counts: sequences of one prompt share what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.errors import EngineBug
from engine.sequence import Sequence


class BlockManager:
    """Hands out fixed-size blocks of the paged KV cache.

    Allocation is all or nothing, so a refusal changes nothing. Layout and sharing as in the paged-attention
    paper (Kwon et al. 2023, sections 4.2 and 4.4): token i of a sequence lives in block
    `block_table[i // block_size]`; a block with several owners is copied by the first that writes into it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # a stack: the block freed last is the one most likely still in the processor's cache
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks
        self._copies: dict[int, int] = {}  # destination -> source, to be done before the next step

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, seq: Sequence) -> int:
        """Blocks the sequence still lacks for its uncomputed tokens, a copy of a shared one included."""
        missing = max(0, self.blocks_for(seq.num_tokens) - len(seq.block_table))
        return missing + (self._shared_block(seq) is not None)

    def grow(self, seq: Sequence) -> bool:
        """Make room for the uncomputed tokens in blocks of its own; False, and no change, when short."""
        if self.missing(seq) > len(self._free):
            return False
        shared = self._shared_block(seq)
        if shared is not None:
            index = seq.num_computed // self.block_size
            seq.block_table[index] = self._take()
            self._copies[seq.block_table[index]] = shared
            self._owners[shared] -= 1
        while len(seq.block_table) < self.blocks_for(seq.num_tokens):
            seq.block_table.append(self._take())
        return True

    def share(self, source: Sequence, target: Sequence, num_blocks: int | None = None) -> None:
        """Let `target`, which has no blocks, own the first `num_blocks` (all) blocks of `source` too."""
        target.block_table = source.block_table[:num_blocks]
        for block in target.block_table:
            self._owners[block] += 1

    def release(self, seq: Sequence) -> None:
        for block in reversed(seq.block_table):
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
                self._copies.pop(block, None)
        seq.block_table.clear()

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, destination) of blocks to be copied before the step that is about to run."""
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove free + used == total and that every count of owners is right. Raises EngineBug."""
        owners = Counter(block for seq in sequences for block in seq.block_table)
        counted = {block: count for block, count in enumerate(self._owners) if count}
        if counted != dict(owners):
            raise EngineBug(f"blocks: owners counted {counted}, found {dict(owners)}")
        if len(self._free) + len(owners) != self.num_blocks or set(self._free) & set(owners):
            raise EngineBug(f"blocks: {len(self._free)} free + {len(owners)} used of {self.num_blocks}")

    def _shared_block(self, seq: Sequence) -> int | None:
        """The block the first uncomputed token falls into, when others own it too."""
        index = seq.num_computed // self.block_size
        if index < len(seq.block_table) and self._owners[seq.block_table[index]] > 1:
            return seq.block_table[index]
        return None

    def _take(self) -> int:
        block = self._free.pop()
        self._owners[block] = 1
        return block
