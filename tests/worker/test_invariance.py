"""Reproducible rows: logits and cache are the same bits in any company, order and pieces."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from engine.plan import StepKind, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.settings import LoraModule, LoraSettings
from scripts import quantize
from scripts.write_random_lora import write_adapter
from scripts.write_random_model import Shape, write_model
from tests.worker.conftest import MODEL, SCHEDULE, write_checkpoint
from worker.attention.base import AttentionBackend, AttentionSpec
from worker.attention.cpu_invariant import CpuInvariantAttention
from worker.attention.cpu_native import CpuNativeAttention
from worker.batch import make_batch, split_by_arithmetic
from worker.layers.activation import silu_mul
from worker.layers.linear import InvariantLinear, PlainLinear, StepArithmetic
from worker.layers.norm import rms_norm
from worker.native.library import all_kernels
from worker.platforms.cpu_kernels import LinearKernels
from worker.platforms.row_sizes import SIZES, equal_sizes
from worker.runner import ModelRunner

TINY = Path(__file__).resolve().parents[2] / "models" / "mindie-tiny"
WIDER = Shape("qwen2", layers=2, hidden=448, heads=7, kv_heads=1, intermediate=1216, vocab=4099, tied=True)
BLOCK = 32
BLOCKS = 300
LENGTHS = (5, 40, 129, 257, 515)
STEPS = 4  # decoded tokens
NO_LORA = LoraSettings()
DTYPES = ("bfloat16", "float32")

Bits = list[torch.Tensor]  # logits, then keys and values of each layer


class Machine:
    """A runner with sequences whose tokens are chosen here: what is compared is the arithmetic."""

    def __init__(self, folder: Path, dtype: str, lora: LoraSettings = NO_LORA, **more: Any) -> None:
        schedule = replace(SCHEDULE, block_size=BLOCK, max_batch_size=64, max_seq_len=600, max_input_len=590)
        model = replace(
            MODEL, weight_path=folder, dtype=dtype, cpu_threads=1, kv_block_num=BLOCKS, lora=lora, **more
        )
        self.runner = ModelRunner(model, schedule, 0, lambda phase, fraction: None)
        self.runner.load()
        self.runner.allocate(BLOCKS)
        self.random = np.random.default_rng(3)
        self._free = self.random.permutation(BLOCKS).tolist()

    def text(self, length: int) -> list[int]:
        return self.random.integers(0, self.runner.vocab_size, length).tolist()

    def sequence(self, tokens: list[int], reproducible: bool = True, lora: str = "") -> Sequence:
        params = SamplingParams(max_tokens=600, reproducible=reproducible, lora=lora)
        return Sequence(0, np.array(tokens, np.int32), params)

    def step(self, kind: StepKind, sequences: list[Sequence]) -> torch.Tensor:
        for sequence in sequences:
            while len(sequence.block_table) * BLOCK < sequence.num_tokens:
                sequence.block_table.append(self._free.pop())
        logits = self.runner.forward(build_plan(kind, sequences, BLOCK))
        for sequence in sequences:
            sequence.num_computed = sequence.num_tokens
        return logits

    def decode(self, sequences: list[Sequence], tokens: list[int]) -> torch.Tensor:
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        return self.step(StepKind.DECODE, sequences)

    def finish(self, sequence: Sequence, logits: torch.Tensor) -> Bits:
        """Its bits; its blocks are free again, full of what they held."""
        slots = torch.tensor(sequence.block_table)
        cached = [
            tensor[slots].flatten(0, 1)[: sequence.num_tokens] for tensor in self.runner._cache.tensors()
        ]
        self._free += sequence.block_table
        sequence.block_table = []
        return [logits, *cached]

    def whole(self, tokens: list[int], lora: str = "") -> Bits:
        """All of it in one prefill, as after a preemption."""
        sequence = self.sequence(tokens, lora=lora)
        return self.finish(sequence, self.step(StepKind.PREFILL, [sequence])[0])


def same(got: Bits, want: Bits) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture(params=["torch", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes: torch's kernels in tiles, or our own, which give every row the same bits anyway."""
    if request.param == "torch":
        monkeypatch.setattr("worker.native.library.all_kernels", lambda: ())
    elif not all_kernels():
        pytest.skip("no compiled kernels")
    else:
        monkeypatch.setattr(
            "worker.platforms.cpu.probe_linears",
            lambda dtype: LinearKernels(True, True, "dot" if dtype is torch.bfloat16 else "float32"),
        )
    return str(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    wider = tmp_path_factory.mktemp("wider")
    write_model(WIDER, wider)
    return {"mindie-tiny": TINY, "wider": wider}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["mindie-tiny", "wider"])
def test_a_row_has_the_same_bits_in_any_company(
    models: dict[str, Path], model: str, dtype: str, way: str
) -> None:
    machine = Machine(models[model], dtype)
    texts = [machine.text(length + STEPS) for length in LENGTHS]
    want = [machine.whole(text) for text in texts]

    own = [machine.sequence(text[:-STEPS]) for text in texts]
    machine.step(StepKind.PREFILL, own)
    for at in range(-STEPS, 0):
        # others come and go, some before and some behind, the latter with a seed
        count = (1, 5, 12, 40)[at]
        lengths = machine.random.integers(1, 25, count).tolist()
        others = [machine.sequence(machine.text(n), row >= count // 2) for row, n in enumerate(lengths)]
        machine.step(StepKind.PREFILL, others)
        before, behind = others[: count // 2], others[count // 2 :]
        tokens = [1] * len(before) + [text[at] for text in texts] + [1] * len(behind)
        logits = machine.decode([*before, *own, *behind], tokens)[len(before) :]
        for other in others:
            machine.finish(other, logits)
    for row, sequence in enumerate(own):
        assert same(machine.finish(sequence, logits[row]), want[row]), LENGTHS[row]


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_by_token_equals_one_prefill(models: dict[str, Path], dtype: str, way: str) -> None:
    machine = Machine(models["wider"], dtype)
    text = machine.text(40)
    want = machine.whole(text)
    sequence = machine.sequence(text[:1])
    logits = machine.step(StepKind.PREFILL, [sequence])
    for token in text[1:]:
        logits = machine.decode([sequence], [token])
    assert same(machine.finish(sequence, logits[0]), want)


@pytest.mark.parametrize(
    ("scheme", "cache"),
    [("w8a8_dynamic", "auto"), ("w8a8", "auto"), ("w8a16", "auto"), ("w8a8_dynamic", "int8")],
)
def test_quantised_rows_keep_their_bits(
    models: dict[str, Path], tmp_path: Path, scheme: str, cache: str
) -> None:
    (tmp_path / "texts").write_text("bade " * 40)
    calibrate = ["--calibrate", str(tmp_path / "texts")] if scheme == "w8a8" else []
    folder = tmp_path / "model"
    arguments = ["--model", str(models["wider"]), "--out", str(folder), "--scheme", scheme, *calibrate]
    assert quantize.main(arguments) == 0
    machine = Machine(folder, "bfloat16", kv_cache_dtype=cache)
    texts = [machine.text(length) for length in (7, 90, 270)]
    want = [machine.whole(text) for text in texts]
    rows = [machine.sequence(text[:-1]) for text in texts]
    rows.insert(1, machine.sequence(machine.text(33)))
    machine.step(StepKind.PREFILL, rows)
    logits = machine.decode(rows, [texts[0][-1], 1, texts[1][-1], texts[2][-1]])
    got = [machine.finish(rows[row], logits[row]) for row in (0, 2, 3)]
    assert all(map(same, got, want))


@pytest.mark.parametrize("name", ["mistral-window", "qwen3", "qwen3-moe", "deepseek-v3"])
def test_rows_of_every_family_keep_their_bits(tmp_path: Path, name: str, way: str) -> None:
    """Which experts the others go to, and where a window begins, is nothing to a row."""
    write_checkpoint(tmp_path, name, torch.bfloat16)
    machine = Machine(tmp_path, "bfloat16")
    texts = [machine.text(length) for length in (7, 40, 90)]
    want = [machine.whole(text) for text in texts]
    rows = [machine.sequence(text[:-1]) for text in texts]
    rows.insert(1, machine.sequence(machine.text(33)))
    machine.step(StepKind.PREFILL, rows)
    logits = machine.decode(rows, [texts[0][-1], 1, texts[1][-1], texts[2][-1]])
    got = [machine.finish(rows[row], logits[row]) for row in (0, 2, 3)]
    assert all(map(same, got, want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_beside_rows_that_decode_equal_one_prefill(
    models: dict[str, Path], dtype: str, way: str
) -> None:
    machine = Machine(models["wider"], dtype)
    texts = [machine.text(length) for length in (150, 30)]
    want = [machine.whole(text) for text in texts]
    seeded = machine.sequence(texts[1][:-6])
    other = machine.sequence(machine.text(20), reproducible=False)
    machine.step(StepKind.PREFILL, [other, seeded])
    piecewise = machine.sequence(texts[0])
    piecewise.block_table = [machine._free.pop() for _ in range(5)]
    for token, end in zip(texts[1][-6:], (1, 33, 34, 90, 149, 150), strict=True):
        for sequence in (other, seeded):
            sequence.append(token)
        rows = [other, piecewise, seeded]
        ends = [other.num_tokens, end, seeded.num_tokens]
        logits = machine.runner.forward(build_plan(StepKind.MIXED, rows, BLOCK, ends=ends))
        for sequence, computed in zip(rows, ends, strict=True):
            sequence.num_computed = computed
    assert same(machine.finish(piecewise, logits[1]), want[0])
    assert same(machine.finish(seeded, logits[2]), want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_usual_way_is_another_one_in_torch_only(models: dict[str, Path], dtype: str, way: str) -> None:
    """Or the tests above would show nothing about torch's reproducible way."""
    machine = Machine(models["wider"], dtype)
    text = machine.text(300)
    sequence = machine.sequence(text, reproducible=False)
    usual = machine.finish(sequence, machine.step(StepKind.PREFILL, [sequence])[0])
    assert same(usual, machine.whole(text)) == (way == "compiled")


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_keep_the_bits(tmp_path: Path, dtype: str, way: str) -> None:
    write_adapter(TINY, tmp_path / "a", rank=8, seed=1)
    lora = LoraSettings(modules=(LoraModule("a", tmp_path / "a"),))
    machine = Machine(TINY, dtype, lora=lora)
    texts = [machine.text(length) for length in (7, 90, 200)]
    want = [machine.whole(text, "a") for text in texts]
    rows = [machine.sequence(text[:-1], lora="a") for text in texts]
    rows.insert(1, machine.sequence(machine.text(33)))
    machine.step(StepKind.PREFILL, rows)
    logits = machine.decode(rows, [texts[0][-1], 1, texts[1][-1], texts[2][-1]])
    got = [machine.finish(rows[row], logits[row]) for row in (0, 2, 3)]
    assert all(map(same, got, want))
    assert not same(machine.whole(texts[0]), want[0])


def test_prompts_are_cut_between_the_two_ways_and_decodes_are_not() -> None:
    wanted = [False, True, True, False, True]
    sequences = []
    for row, reproducible in enumerate(wanted):
        sequence = Sequence(
            row, np.arange(3, dtype=np.int32), SamplingParams(max_tokens=1, reproducible=reproducible)
        )
        sequence.block_table = [row]
        sequences.append(sequence)
    pieces = split_by_arithmetic(build_plan(StepKind.PREFILL, sequences, 4))
    assert [(len(piece.sequences), invariant) for piece, invariant in pieces] == [
        (1, False), (2, True), (1, False), (1, True),
    ]  # fmt: skip
    assert [s for piece, _ in pieces for s in piece.sequences] == sequences
    for sequence in sequences:
        sequence.num_computed = 2
    decode = build_plan(StepKind.DECODE, sequences, 4)
    assert split_by_arithmetic(decode) == [(decode, True)]
    others = build_plan(StepKind.DECODE, [sequences[0], sequences[3]], 4)
    assert split_by_arithmetic(others) == [(others, False)]


# -- the parts --------------------------------------------------------------------------------------------


def alone(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(row) for row in torch.split(x, 1)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_and_activation_treat_every_row_alike(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    for width in (154, 768, 3 * 3584, 40000):  # the last: one row is more than a thread's share
        x = (torch.randn(60, 2 * width) * 4).to(dtype)
        gated = alone(silu_mul, x)
        for rows in (1, 2, 7, 13, 33, 60):
            assert torch.equal(silu_mul(x[:rows]), gated[:rows]), (width, rows)
    for width in (48, 896, 16384):
        x, weight = torch.randn(60, width).to(dtype), torch.randn(width).to(dtype)
        normed = torch.cat([rms_norm(row, weight, 1e-6) for row in torch.split(x, 1)])
        for rows in (2, 7, 13, 33, 60):
            assert torch.equal(rms_norm(x[:rows], weight, 1e-6), normed[:rows]), (width, rows)


class Fickle(PlainLinear):
    """Sums up in another order wherever `changes` says so: [(rows of the product, place of the row)]."""

    def __init__(self, weight: torch.Tensor, changes: Callable[[int, int], bool]) -> None:
        super().__init__(weight, None)
        self._changes = changes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.float().chunk(2, dim=1)
        a, b = self._weight.float().chunk(2, dim=1)
        halves = torch.stack(
            [(row * a).sum(1) + (other * b).sum(1) for row, other in zip(left, right, strict=True)]
        )
        whole = torch.stack([(row * self._weight.float()).sum(1) for row in x.float()])
        changed = torch.tensor([self._changes(len(x), place) for place in range(len(x))])
        return torch.where(changed[:, None], halves, whole).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        (lambda rows, place: False, SIZES),
        (lambda rows, place: rows == 1, SIZES[1:]),
        (lambda rows, place: rows >= 48, SIZES[: SIZES.index(48)]),
        (lambda rows, place: place == rows - 1 and rows > 2, (1, 2)),
    ],
)
def test_the_probe_finds_where_the_order_of_summation_changes(
    changes: Callable[[int, int], bool], sizes: Seq[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    weight = torch.randn(96, 160).to(dtype)
    assert equal_sizes(Fickle(weight, changes), weight, None) == tuple(sizes)


def test_tiles_are_only_of_the_sizes_found() -> None:
    seen: list[int] = []

    class Counting(PlainLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().__call__(x)

    step = StepArithmetic()
    weight = torch.eye(8)
    linear = InvariantLinear(PlainLinear(weight, None), Counting(weight, None), (2, 16, 64), step)
    x = torch.randn(150, 8)
    assert torch.equal(linear(x), x) and seen == []
    step.invariant = True
    assert torch.equal(linear(x), x) and seen == [64, 64, 64]
    assert torch.equal(linear(x[:1]), x[:1]) and torch.equal(linear(x[3:8]), x[3:8])
    assert seen[3:] == [2, 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_width_that_changes_the_order_of_summation_is_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = functional.scaled_dot_product_attention

    def backwards_at_128(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor
    ) -> torch.Tensor:
        if k.shape[2] % 512 == 128:
            k, v, attn_mask = k.flip(2), v.flip(2), attn_mask.flip(3)
        return honest(q, k, v, attn_mask=attn_mask)

    spec = AttentionSpec(4, 2, 64, dtype)
    widths = CpuInvariantAttention(spec)._widths.tolist()
    assert widths[-1] == 512
    monkeypatch.setattr(functional, "scaled_dot_product_attention", backwards_at_128)
    assert CpuInvariantAttention(spec)._widths.tolist() == [width for width in widths if width != 128]


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1100), st.one_of(st.just(1), st.integers(1, 70))), min_size=1, max_size=6
    ),
    decode=st.booleans(),
    heads=st.sampled_from([(4, 2), (14, 2), (6, 1), (3, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 2),
)
def test_attention_in_a_batch_equals_each_row_alone(
    rows: list[tuple[int, int]], decode: bool, heads: tuple[int, int], dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(len(rows))
    dim, blocks = 16, iter(range(1000))
    spec = AttentionSpec(heads[0], heads[1], dim, dtype)
    backends: list[AttentionBackend] = [CpuInvariantAttention(spec)]
    backends += [CpuNativeAttention(spec, kernels) for kernels in all_kernels()]
    sequences = []
    for cached, new in rows:
        sequence = Sequence(
            0, np.zeros(cached + (1 if decode else new), np.int32), SamplingParams(max_tokens=1)
        )
        sequence.num_computed = cached
        sequence.block_table = [next(blocks) for _ in range(-(-sequence.num_tokens // 16))]
        sequences.append(sequence)
    kind = StepKind.DECODE if decode else StepKind.PREFILL
    caches = torch.randn(2, next(blocks), 16, heads[1], dim).to(dtype).unbind(0)

    def run(
        backend: AttentionBackend,
        plan_rows: list[Sequence],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        batch = make_batch(build_plan(kind, plan_rows, 16), torch.device("cpu"))
        backend.begin_step(batch, 16)
        spans = torch.split(torch.arange(len(q)), [seq.num_tokens - seq.num_computed for seq in plan_rows])
        order = torch.cat(spans if batch.order is None else [spans[row] for row in batch.order])
        out = backend.forward(q[order], k[order], v[order], *caches)
        return torch.empty_like(out).index_copy_(0, order, out)

    lengths = [s.num_tokens - s.num_computed for s in sequences]
    q, k, v = (torch.randn(sum(lengths), n, dim).to(dtype) for n in (heads[0], heads[1], heads[1]))
    for backend in backends:
        together = torch.split(run(backend, sequences, q, k, v), lengths)
        for row, parts in enumerate(zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True)):
            assert torch.equal(run(backend, [sequences[row]], *parts), together[row]), (row, rows[row])
