"""Who owns which KV block, with reference counts: sequences of one prompt share what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from engine.errors import EngineBug
from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence


class BlockManager:
    """Hands out fixed-size blocks of the paged KV cache.

    Allocation is all or nothing, so a refusal changes nothing. Layout and sharing as in the paged-attention
    paper (Kwon et al. 2023, sections 4.2 and 4.4): token i of a sequence lives in block
    `block_table[i // block_size]`; a block with several owners is copied by the first that writes into it.
    With a prefix cache, a block that others may find is never written again either.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = False) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # a stack: the block freed last is the one most likely still in the processor's cache
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks
        self._copies: dict[int, int] = {}  # destination -> source, to be done before the next step
        self._cache = PrefixCache(block_size) if prefix_cache else None

    @property
    def has_prefix_cache(self) -> bool:
        return self._cache is not None

    @property
    def num_free(self) -> int:
        """Blocks that can be had, those among them that are kept for whoever asks for their content."""
        return len(self._free) + (self._cache.num_idle if self._cache else 0)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, seq: Sequence, ahead: int = 0) -> int:
        """Blocks the sequence still lacks for its uncomputed tokens and `ahead` more, a copy of a shared one
        included.
        """
        missing = max(0, self.blocks_for(seq.num_tokens + ahead) - len(seq.block_table))
        return missing + (self._shared_block(seq) is not None)

    def grow(self, seq: Sequence, ahead: int = 0) -> bool:
        """Make room for the uncomputed tokens, and for `ahead` that may follow, in blocks of its own.

        False, and no change, when short.
        """
        if self.missing(seq, ahead) > self.num_free:
            return False
        shared = self._shared_block(seq)
        if shared is not None:
            index = seq.num_computed // self.block_size
            seq.block_table[index] = self._take()
            self._copies[seq.block_table[index]] = shared
            self._drop(shared)
        while len(seq.block_table) < self.blocks_for(seq.num_tokens + ahead):
            seq.block_table.append(self._take())
        return True

    def share(self, source: Sequence, target: Sequence, num_blocks: int | None = None) -> None:
        """Let `target`, which has no blocks, own the first `num_blocks` (all) blocks of `source` too."""
        target.block_table = source.block_table[:num_blocks]
        target.num_published = min(source.num_published, len(target.block_table))
        for block in target.block_table:
            self._owners[block] += 1

    def release(self, seq: Sequence) -> None:
        # the end of a text is asked for less often than its beginning, and gives way first
        for block in reversed(seq.block_table):
            self._drop(block)
        seq.block_table.clear()
        seq.num_published = 0

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, destination) of blocks to be copied before the step that is about to run."""
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def content_of(self, block: int) -> int:
        """The block that holds its content now: another one while its copy has not been made."""
        return self._copies.get(block, block)

    def arrange(self, tables: Mapping[Sequence, Seq[int]]) -> dict[int, int]:
        """Give the sequences, which have none, blocks like these: what is one number there is one block.

        The block of each number.
        """
        placed: dict[int, int] = {}
        for seq, table in tables.items():
            for number in table:
                if number in placed:
                    self._owners[placed[number]] += 1
                else:
                    placed[number] = self._take()
                seq.block_table.append(placed[number])
        return placed

    # -- prefix cache -------------------------------------------------------------------------------

    def find(self, seq: Sequence) -> list[int]:
        """Blocks that hold the beginning of `seq` already; never its last token, whose logits are wanted."""
        if self._cache is None:
            return []
        return self._cache.find(seq, (seq.num_tokens - 1) // self.block_size)

    def is_known(self, block: int) -> bool:
        """Whether others may find it by its content."""
        return self._cache is not None and block in self._cache

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these, each counted once, would be missing among the free ones if they were owned."""
        return sum(self._cache.is_idle(block) for block in set(blocks)) if self._cache else 0

    def adopt(self, seq: Sequence, blocks: Seq[int]) -> None:
        """Let `seq`, which has no blocks, own these that `find` has found for it: so much is computed."""
        seq.block_table = list(blocks)
        seq.num_published = len(blocks)
        seq.num_computed = len(blocks) * self.block_size
        for block in blocks:
            self._owners[block] += 1
            if self._cache is not None:
                self._cache.revive(block)

    def publish(self, seq: Sequence) -> None:
        """After a step: others may find the blocks that it has filled."""
        full = seq.num_computed // self.block_size
        if self._cache is not None and full > seq.num_published:
            self._cache.publish(seq, full)

    # -----------------------------------------------------------------------------------------------

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove free + idle + used == total, and that every count of owners is right. Raises EngineBug."""
        sequences = list(sequences)
        owners = Counter(block for seq in sequences for block in seq.block_table)
        counted = {block: count for block, count in enumerate(self._owners) if count}
        if counted != dict(owners):
            raise EngineBug(f"blocks: owners counted {counted}, found {dict(owners)}")
        if self.num_free + len(owners) != self.num_blocks or set(self._free) & set(owners):
            raise EngineBug(f"blocks: {self.num_free} free + {len(owners)} used of {self.num_blocks}")
        if any(map(self.is_known, self._free)):
            raise EngineBug("blocks: others may find a blank block")
        if self._cache is not None:
            self._cache.check(owners)

    def _shared_block(self, seq: Sequence) -> int | None:
        """The block the first uncomputed token falls into, when others own it too, or may."""
        index = seq.num_computed // self.block_size
        if index >= len(seq.block_table):
            return None
        block = seq.block_table[index]
        return block if self._owners[block] > 1 or self.is_known(block) else None

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            assert self._cache is not None
            block = self._cache.evict()
        self._owners[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._owners[block] -= 1
        if self._owners[block]:
            return
        self._copies.pop(block, None)
        if self._cache is None or not self._cache.retire(block):
            self._free.append(block)
