"""Who owns which KV block. A block belongs to one sequence or to the free list, never to both."""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import EngineBug
from engine.sequence import Sequence


class BlockManager:
    """Hands out fixed-size blocks of the paged KV cache.

    Allocation is all or nothing, so a refusal changes nothing. Layout as in the paged-attention paper
    (Kwon et al. 2023, section 4.2): token i of a sequence lives in block `block_table[i // block_size]`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # a stack: the block freed last is the one most likely still in the processor's cache
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) <= self.num_blocks

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks the sequence still lacks to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(seq.block_table))

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the table cover `num_tokens` tokens; False, and no change, when blocks are short."""
        missing = self.missing(seq, num_tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            seq.block_table.append(self._free.pop())
        return True

    def release(self, seq: Sequence) -> None:
        self._free.extend(reversed(seq.block_table))
        seq.block_table.clear()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove free + used == total with every block owned once. Raises EngineBug."""
        owned = [block for seq in sequences for block in seq.block_table] + self._free
        if len(owned) != self.num_blocks or set(owned) != set(range(self.num_blocks)):
            raise EngineBug(
                f"blocks: {len(owned)} accounted for ({len(set(owned))} distinct), {self.num_blocks} exist"
            )
