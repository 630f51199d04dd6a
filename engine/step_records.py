"""What the leader of an instance tells its other ranks, as it lies on their rings.

A record is a header, int32 arrays as they lie in memory, then text. That of a step holds what a rank needs to
compute it, and nothing that only the sampling of it needs.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineBug
from engine.plan import Int32Array, StepKind, StepPlan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

# kind of record; kind of step; whether anything is sampled; rows, tokens, width of the block table; copies,
# blocks swapped out and in; bytes of text
_STEP = Struct("<BBB1xIIIIIII")
_ADAPTER = Struct("<B3xII")  # kind of record; bytes of name, bytes of directory
_STEP_KIND, _INSTALL_KIND, _REMOVE_KIND = 1, 2, 3
_REPRODUCIBLE, _OWES_SCORES = 1, 2  # flags of a row
_NAMES_END = "\0"  # no name of an adapter holds it


@dataclass(frozen=True, slots=True)
class InstallAdapter:
    name: str
    path: str  # of its directory


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    name: str


Record = StepPlan | InstallAdapter | RemoveAdapter


def encode(record: Record) -> bytes:
    match record:
        case StepPlan():
            return _encode_step(record)
        case InstallAdapter(name, path):
            texts, kind = (name.encode(), path.encode()), _INSTALL_KIND
        case RemoveAdapter(name):
            texts, kind = (name.encode(), b""), _REMOVE_KIND
    return _ADAPTER.pack(kind, *map(len, texts)) + b"".join(texts)


def decode(data: bytes) -> Record:
    """Raises EngineBug for what `encode` has not made."""
    kind = data[0] if data else 0
    if kind == _STEP_KIND:
        return _decode_step(data)
    if kind not in (_INSTALL_KIND, _REMOVE_KIND):
        raise EngineBug(f"a record of unknown kind {kind}, {len(data)} bytes")
    _, name_bytes, _path_bytes = _ADAPTER.unpack_from(data)
    name = data[_ADAPTER.size : _ADAPTER.size + name_bytes].decode()
    path = data[_ADAPTER.size + name_bytes :].decode()
    return InstallAdapter(name, path) if kind == _INSTALL_KIND else RemoveAdapter(name)


def _encode_step(plan: StepPlan) -> bytes:
    names = list(dict.fromkeys(seq.params.lora for seq in plan.sequences))
    text = _NAMES_END.join(names).encode()
    facts = np.empty((4, plan.num_rows), np.int32)
    for row, seq in enumerate(plan.sequences):
        owes = seq.owes_prompt_scores
        flags = _REPRODUCIBLE * seq.params.reproducible | _OWES_SCORES * owes
        facts[:, row] = flags, names.index(seq.params.lora), seq.num_prompt, seq.num_told
    header = _STEP.pack(
        _STEP_KIND,
        plan.kind,
        bool(plan.samples),
        plan.num_rows,
        plan.num_tokens,
        plan.block_table.shape[1],
        len(plan.copies),
        len(plan.swap_out),
        len(plan.swap_in),
        len(text),
    )
    arrays = [
        plan.input_ids, plan.positions, plan.slot_mapping, plan.query_start, plan.context_len,
        plan.block_table.ravel(), facts.ravel(),
        *(np.array(moves, np.int32).ravel() for moves in (plan.copies, plan.swap_out, plan.swap_in)),
    ]  # fmt: skip
    return header + np.concatenate(arrays).astype(np.int32, copy=False).tobytes() + text


def _decode_step(data: bytes) -> StepPlan:
    _, kind, samples, rows, tokens, width, *moves, text_bytes = _STEP.unpack_from(data)
    counts = [tokens, tokens, tokens, rows + 1, rows, rows * width, 4 * rows, *(2 * count for count in moves)]
    numbers = np.frombuffer(data, np.int32, sum(counts), _STEP.size)
    if len(data) != _STEP.size + numbers.nbytes + text_bytes:
        raise EngineBug(f"a step of {rows} rows and {tokens} tokens in {len(data)} bytes")
    ids, positions, slots, query_start, context_len, table, facts, copies, swap_out, swap_in = np.split(
        numbers, np.cumsum(counts[:-1])
    )
    names = data[len(data) - text_bytes :].decode().split(_NAMES_END)
    sequences = [_stand_in(names, *row) for row in facts.reshape(4, rows).T.tolist()]
    return StepPlan(
        kind=StepKind(kind),
        sequences=sequences,
        input_ids=ids,
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_len=context_len,
        block_table=table.reshape(rows, width),
        samples=sequences if samples else (),
        copies=_pairs(copies),
        swap_out=_pairs(swap_out),
        swap_in=_pairs(swap_in),
    )


def _pairs(numbers: Int32Array) -> Seq[tuple[int, int]]:
    flat = numbers.tolist()
    return list(zip(flat[::2], flat[1::2], strict=True))


def _stand_in(names: list[str], flags: int, name: int, num_prompt: int, num_told: int) -> Sequence:
    """A sequence that answers what the computing of a step asks; it has no tokens."""
    params = _params(names[name], bool(flags & _REPRODUCIBLE), bool(flags & _OWES_SCORES))
    sequence = Sequence(0, _NO_TOKENS, params)
    sequence.num_prompt, sequence.num_told = num_prompt, num_told
    return sequence


_NO_TOKENS: NDArray[np.int32] = np.empty(0, np.int32)


@lru_cache(maxsize=256)  # names of adapters come and go
def _params(lora: str, reproducible: bool, owes_scores: bool) -> SamplingParams:
    return SamplingParams(
        max_tokens=0, lora=lora, reproducible=reproducible, prompt_logprobs=0 if owes_scores else -1
    )
