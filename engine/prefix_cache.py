"""Which blocks hold which tokens, so that a prompt that begins like an earlier one need not compute it again.

A full block is known by a digest of its tokens and of everything before them: a chain that begins with what
else the keys and values depend on, or with whom they may be shared. The digests are keyed with a secret of
this process, so nobody can look for prompts that collide.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping

from engine.errors import EngineBug
from engine.sequence import Sequence

_DIGEST_BYTES = 16


class PrefixCache:
    """Digests of blocks, and the blocks nobody owns any more, of which the one unused for longest goes first.

    Of several blocks with the same content only the first is known.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = os.urandom(hashlib.blake2b.MAX_KEY_SIZE)
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the order of their last use

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def find(self, seq: Sequence, most: int) -> list[int]:
        """The known blocks that hold the beginning of `seq`, at most so many."""
        found = []
        for digest in self._digests(seq, most)[:most]:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, seq: Sequence, num_blocks: int) -> None:
        """The first `num_blocks` of its table are full and computed; others may use them from now on."""
        digests = self._digests(seq, num_blocks)
        for index in range(seq.num_published, num_blocks):
            block, digest = seq.block_table[index], digests[index]
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest
        seq.num_published = num_blocks

    def retire(self, block: int) -> bool:
        """Nobody owns it any more; whether it stays, as somebody may ask for its content."""
        if block not in self._digest_of:
            return False
        self._idle[block] = None
        return True

    def revive(self, block: int) -> None:
        """Somebody owns it again."""
        self._idle.pop(block, None)

    def evict(self) -> int:
        """Forget the idle block that was used longest ago, and give it away."""
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block

    def check(self, owners: Mapping[int, int]) -> None:
        """Prove that every known block is either owned or idle. Raises EngineBug."""
        if {block: digest for digest, block in self._block_of.items()} != self._digest_of:
            raise EngineBug("prefix cache: digests and blocks do not belong together")
        if set(self._idle) != {block for block in self._digest_of if not owners.get(block)}:
            raise EngineBug(f"prefix cache: idle {set(self._idle)} of {set(self._digest_of)}")

    def _digests(self, seq: Sequence, at_least: int) -> list[bytes]:
        """Of its first blocks, each computed once in the life of the sequence: tokens only ever follow."""
        known, size = seq.block_digests, self._block_size
        for start in range(len(known) * size, at_least * size, size):
            before = known[-1] if known else self._root(seq)
            known.append(self._digest(before + seq.tokens[start : start + size].tobytes()))
        return known

    def _root(self, seq: Sequence) -> bytes:
        """What tokens alone do not tell: whose they are, the adapter, and the arithmetic (see runner.py)."""
        params, salt = seq.params, seq.cache_salt
        return self._digest(bytes((len(salt), params.reproducible)) + salt + params.lora.encode())

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES, key=self._secret).digest()
