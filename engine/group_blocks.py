"""What a whole group needs of the cache to be computed, and how it gets it."""

from __future__ import annotations

from typing import NamedTuple

from engine.block_manager import BlockManager
from engine.sequence import Sequence, SequenceGroup


class Needs(NamedTuple):
    blocks: int  # that are free now
    tokens: int  # to be computed


def needs(blocks: BlockManager, group: SequenceGroup) -> Needs:
    """Of the prefill of a group without blocks."""
    num_blocks = num_tokens = 0
    known: list[int] = []
    for seq, found, shared in _beginnings(blocks, group):
        known += found
        begun = max(len(found), shared)
        num_blocks += blocks.blocks_for(seq.num_tokens) - begun
        num_tokens += seq.num_tokens - begun * blocks.block_size
    return Needs(num_blocks + blocks.num_idle(known), num_tokens)


def allocate(blocks: BlockManager, group: SequenceGroup) -> None:
    """Take what it needs, which has to be there; what is in the cache already counts as computed."""
    beginnings = _beginnings(blocks, group)
    for seq, found, _ in beginnings:  # all of them first: what is taken may be what another one has found
        blocks.adopt(seq, found)
    source = beginnings[0][0]
    for seq, found, shared in beginnings:
        if len(found) < shared:
            blocks.release(seq)
            blocks.share(source, seq, shared)
            seq.num_computed = shared * blocks.block_size
        grown = blocks.grow(seq)
        assert grown, group
    if not group.has_output and not group.num_preemptions:
        group.num_cached = source.num_computed


def can_ever_hold(blocks: BlockManager, group: SequenceGroup) -> bool:
    """Whether the group, alone in the cache, could take one more step."""
    shared = _shared_prompt_blocks(blocks, group)
    alone = [blocks.blocks_for(seq.num_tokens + 1) for seq in group.live]
    return alone[0] + sum(count - shared for count in alone[1:]) <= blocks.num_blocks


def _beginnings(blocks: BlockManager, group: SequenceGroup) -> list[tuple[Sequence, list[int], int]]:
    """The sequences to be computed, each with known blocks and the number it shares with the first one.

    Before there is output, that is the one prompt.
    """
    if not group.has_output:
        source = group.sequences[0]
        # what the model thinks of a prompt is told by computing it
        return [(source, [] if source.owes_prompt_scores else blocks.find(source), 0)]
    shared = _shared_prompt_blocks(blocks, group)
    first, *others = group.live
    return [(first, blocks.find(first), 0), *((seq, blocks.find(seq), shared) for seq in others)]


def _shared_prompt_blocks(blocks: BlockManager, group: SequenceGroup) -> int:
    """Whole blocks of prompt that branches share when a group is computed again.

    Not the last token of any branch: its logits are what the step is for.
    """
    return (group.sequences[0].num_prompt - 1) // blocks.block_size
